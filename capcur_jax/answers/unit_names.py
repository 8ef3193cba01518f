"""Names of units and currencies beside those of pint and CLDR, and words that are no unit."""

# pint's registry knows a word such as "cat" as a centi-at: only these of its units are read.
_KNOWN = (
    "meter gram second ampere kelvin mole candela hertz newton pascal joule watt volt coulomb farad ohm siemens "
    "tesla henry weber lumen lux becquerel gray sievert liter metric_ton electron_volt calorie bar "
    "standard_atmosphere torr millimeter_Hg minute hour day week month year fortnight decade century inch foot "
    "yard mile nautical_mile acre hectare pound ounce stone ton carat gallon quart pint cup fluid_ounce "
    "tablespoon teaspoon barrel mile_per_hour kilometer_per_hour knot revolutions_per_minute byte bit horsepower "
    "watt_hour kilowatt_hour light_year parsec astronomical_unit force_pound pound_force_per_square_inch "
    "cubic_centimeter dyne erg angstrom micron poise british_thermal_unit degree_Celsius degree_Fahrenheit "
    "degree_Rankine dalton molar kilometer_per_second meter_per_second foot_per_second furlong fathom rod slug "
    "grain dram katal"
)
KNOWN = frozenset(_KNOWN.split())
MORE = {  # what neither pint nor CLDR calls so
    "gm": "gram", "gms": "gram", "kgs": "kilogram", "kmh": "kilometer/hour", "kmph": "kilometer/hour",
    "kph": "kilometer/hour", "cms": "centimeter", "mtr": "meter", "mtrs": "meter", "sec": "second",
    "secs": "second", "msec": "millisecond", "mins": "minute", "hrs": "hour", "yr": "year", "yrs": "year",
    "wk": "week", "mo": "month", "l": "liter", "ltr": "liter", "litre": "liter", "litres": "liter",
    "cc": "centimeter^3", "sq": "", "''": "inch", "\"": "inch", "'": "foot", "ha": "hectare", "mph": "mile/hour",
    "fps": "foot/second", "mps": "meter/second", "psi": "pound_force_per_square_inch", "amp": "ampere",
    "amps": "ampere", "lbs": "pound", "celsius": "degree_Celsius", "degc": "degree_Celsius",
    "degf": "degree_Fahrenheit", "fahrenheit": "degree_Fahrenheit", "h": "hour", "d": "day", "千米": "kilometer",
    "公分": "centimeter", "公尺": "meter", "千克": "kilogram", "公斤": "kilogram", "斤": "kilogram/2",
    "分": "minute", "时": "hour", "小时": "hour", "钟头": "hour", "天": "day", "日": "day", "年": "year",
    "个月": "month", "周": "week", "秒": "second", "秒钟": "second", "度": "angle", "立方厘米": "centimeter^3",
    "立方米": "meter^3", "平方厘米": "centimeter^2", "平方米": "meter^2", "平方千米": "kilometer^2",
    "平方公里": "kilometer^2", "平方分米": "decimeter^2", "立方分米": "decimeter^3", "平方毫米": "millimeter^2",
    "吨": "metric_ton", "亩": "hectare/15", "摄氏度": "degree_Celsius", "华氏度": "degree_Fahrenheit",
    "岁": "year", "伏": "volt", "伏特": "volt", "欧": "ohm", "欧姆": "ohm", "瓦": "watt", "安": "ampere",
    "安培": "ampere", "牛": "newton", "牛顿": "newton", "焦": "joule", "焦耳": "joule", "帕": "pascal",
    "赫兹": "hertz", "千米/时": "kilometer/hour", "千米/小时": "kilometer/hour", "米/秒": "meter/second",
    "米每秒": "meter/second",
}  # fmt: skip
BOTH = {
    "c": ("coulomb", "degree_Celsius"), "f": ("farad", "degree_Fahrenheit"), "C": ("coulomb", "degree_Celsius"),
    "F": ("farad", "degree_Fahrenheit"),
}  # fmt: skip
MONEY = {  # words of everyday; symbols, codes and full names are CLDR's
    "$": ("USD", "AUD", "CAD", "SGD", "HKD"), "dollar": ("USD", "AUD", "CAD", "SGD", "HKD"), "buck": ("USD",),
    "euro": ("EUR",), "pound": ("GBP",), "quid": ("GBP",), "rupee": ("INR",), "rs": ("INR",), "yen": ("JPY",),
    "yuan": ("CNY",), "rmb": ("CNY",), "¥": ("JPY", "CNY"), "元": ("CNY",), "块": ("CNY",), "块钱": ("CNY",),
    "peso": ("MXN",), "won": ("KRW",), "ruble": ("RUB",), "franc": ("CHF",), "us$": ("USD",), "c$": ("CAD",),
    "a$": ("AUD",), "hk$": ("HKD",), "美元": ("USD",), "欧元": ("EUR",), "英镑": ("GBP",), "日元": ("JPY",),
    "人民币": ("CNY",),
}  # fmt: skip
HUNDREDTHS = {
    "cent": ("USD", "EUR", "AUD", "CAD"), "¢": ("USD",), "penny": ("USD", "GBP"), "pence": ("GBP",),
    "pennie": ("USD", "GBP"), "paise": ("INR",),
}  # fmt: skip
# Words that change a number's value or join it to another: "5 dozen", "5 or six", "5 cubed" are not a 5 with a unit.
_NO_NOUN = (
    "hundred hundreds thousand thousands million millions billion billions trillion dozen dozens score lakh "
    "crore half halves third thirds quarter quarters fourth fourths fifth fifths sixth eighth tenth tenths "
    "thousandth hundredth millionth st nd rd th hundredths thousandths one two three four five six seven eight "
    "nine ten eleven twelve zero twenty thirty forty fifty plus minus over divided multiplied by squared "
    "cubed factorial root percent mod power or and to through nor not versus vs but than if is are equals "
    "equal from until between except maybe k pi e i x y z n"
)
NO_NOUN = (
    frozenset(_NO_NOUN.split())
    | frozenset(
        ("square", "cube", "negative", "positive", "less", "more", "gross", "mill", "alpha", "beta", "gamma", "theta")
    )
    | frozenset("成折")
)
PREFIXES = ("", "nano", "micro", "milli", "centi", "deci", "hecto", "kilo", "mega", "giga", "tera")
# Short names that people write in any case; of others the case counts.
ANY_CASE = frozenset(
    ("cm", "mm", "km", "kg", "mg", "ml", "dm", "nm", "hz", "khz", "ghz", "kwh", "kpa", "kj", "min", "ft", "lb")
)
# CLDR's key of a unit -> pint's name, where they differ.
PINT_NAMES = {
    "celsius": "degree_Celsius", "fahrenheit": "degree_Fahrenheit", "tonne": "metric_ton", "angle": "",
    "degree": "angle",
    "foodcalorie": "kilocalorie", "nautical-mile": "nautical_mile", "light-year": "light_year",
    "fluid-ounce": "fluid_ounce", "astronomical-unit": "astronomical_unit",
}  # fmt: skip
# Chinese counters: three of anything.
COUNTERS = frozenset("个個只隻头匹条张本支枝件台辆架艘棵朵颗粒片双对套位名人次")
# Short names that may stand right behind a number; others there are variables: "12cm", but 4ac and 2xy.
_ATTACHED = (
    "sec mins hr hrs yr yrs kgs cms lbs mph kph kmh rpm deg rad cal kcal bar atm gal psi oz yd mi in gb mb kb tb cc "
    "mol ohm hp mwh usd eur rmb cny yuan ms cl"
)
ATTACHED = ANY_CASE | frozenset(_ATTACHED.split())
