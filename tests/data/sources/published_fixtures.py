"""A few invented rows of every published set, in exactly its format and folders, broken ones among them."""

import hashlib
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image


def image_bytes(color="red", kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(buffer, kind)
    return buffer.getvalue()


def put(path, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(kind="JPEG" if path.suffix == ".jpg" else "PNG") if content is None else content)
    return path


def put_lines(path, *rows):
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    return put(path, b"".join(line + b"\n" for line in lines))


def put_json(path, value):
    return put(path, json.dumps(value).encode())


def put_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def docci(folder: Path):
    put(folder / "images/train_00000.jpg")
    put(folder / "images/qual_dev_00001.jpg")

    def row(example_id, split, description, **more):
        name = f"{example_id}.jpg"
        return {"type": "docci", "split": split, "example_id": example_id, "image_file": name} | {
            "description": description,
            **more,
        }

    put_lines(
        folder / "docci_descriptions.jsonlines",
        row("train_00000", "train", " A red barn left of two trees.\n"),
        row("train_00009", "train", "Its image was never unpacked."),
        b'{"example_id": "train_00010", "split": "train"',
        row("qual_dev_00001", "qual_dev", "A blue cup."),
        row("train_00000", "train", " A red barn left of two trees.\n"),
        row("train_00000", "train", "Another description of the same image."),
        row("train_00000", "train", "   "),
        row("train_00011", "train", "No name.", image_file="../secret.jpg"),
        ["not", "an", "object"],
        b"\xff\xfe broken bytes",
    )


def pixmo_cap(folder: Path):
    urls = [f"https://example.org/{name}" for name in ("a.jpg", "gone.jpg", "b", "c.png")]
    for url, suffix in zip(urls, (".jpg", None, "", ".png"), strict=True):
        if suffix is not None:
            put(folder / "images" / f"{hashlib.sha256(url.encode()).hexdigest()}{suffix}")
    rows = [
        {"image_url": url, "caption": f"What {url[-5:]} shows.", "transcripts": ["well", "a picture"]} for url in urls
    ]
    rows += [{"image_url": urls[0], "caption": "", "transcripts": []}, {"image_url": None, "caption": "x"}]
    put_parquet(folder / "data/train-00000-of-00002.parquet", rows[:3])
    put_parquet(folder / "data/train-00001-of-00002.parquet", rows[3:])


def orz_math(folder: Path):
    def dialogue(question, answer, **truth):
        return [
            {"from": "human", "value": question},
            {"from": "assistant", "ground_truth": {"value": answer} | truth},
        ]

    put_json(
        folder / "orz_math_13k_collection_hard.json",
        [
            dialogue("What is $2+2$?", "4", pass_at_n=0.25),
            dialogue("Find $x$.", r"\boxed{\frac{1}{2}}"),
            dialogue("Who?", ""),
            dialogue("", "7"),
            [{"from": "human", "value": "Half a dialogue"}],
            [{"from": "assistant", "value": "x"}, {"from": "human", "value": "y"}],
            "text",
            dialogue("In <image>, what is x?", "3"),
            dialogue("Which one?", 12),
            dialogue("Prove it.", "a" * 600),
        ],
    )
    put_json(folder / "orz_math_57k_collected.json", [dialogue("Only in the larger file", "1")])


def clevr_math(folder: Path):
    put(folder / "CLEVR_v1.0/images/train/CLEVR_train_000000.png")
    put(folder / "images/CLEVR_test_000003.png")

    def row(image, split, question, answer, index, template="subtraction"):
        return {
            "split": split, "image_filename": image, "image_index": 0, "question": question, "answer": answer,
            "template_filename": f"{template}.json", "question_index": index, "program": [{"type": "scene"}],
        }  # fmt: skip

    train, test = "CLEVR_train_000000.png", "CLEVR_test_000003.png"
    put_json(
        folder / "clevr-math-train.json",
        {
            "info": {"license": "x", "questions": [1, 2]},
            "questions": [
                row(train, "train", "Subtract all cubes. How many objects are left?", 3, 0),
                row(train, "train", "Add 2 balls. How many balls are there?", "5", 1, "addition"),
                row("CLEVR_train_000001.png", "train", "Where is the image?", 2, 2),
                row(train, "train", "True?", True, 3),
                row(train, "train", "No answer?", None, 4),
                row(train, None, "No split?", 1, 5),
            ],
        },
    )
    put_json(
        folder / "clevr-math-test.json",
        {"questions": [row(test, "test", "Take away the ball. How many?", 0, 0, "subtraction-multihop")]},
    )


GEO_INSTRUCTION = (
    "<image>\nFirst perform reasoning, then finally select the question from the choices in the following format: "
    "Answer: xxx.\nQuestion:"
)


def geoqa170k(folder: Path):
    put(folder / "images/geoqa_plus/1.png")

    def row(question, solution, image="geoqa_plus/1.png"):
        return {
            "image": image,
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": solution}],
        }

    choices = "\nChoices:\nA:40°\nB:60°\nC:80°\nD:100°"
    put_json(
        folder / "qa_tuning.json",
        [
            row(f"{GEO_INSTRUCTION}How large is angle C?{choices}", "It is 180° - 100°.\nAnswer:C"),
            row(f"{GEO_INSTRUCTION}How large is B?{choices}", "So the answer is (B) 60°."),
            row(f"{GEO_INSTRUCTION}How large is D?{choices}", "It can be seen at once."),
            row(f"{GEO_INSTRUCTION}How large is E?{choices}", "Answer: E"),
            row(f"{GEO_INSTRUCTION}Length?\nChoices:\nA: 4.0\nB: 12.0\nC: 8.0\nD: 4.0", "Answer: A"),
            row("<image>\nWhat is the radius?", "The radius is 7.\nAnswer: 7"),
            row("<image>\nDescribe the figure.", "The answer is that two lines meet in a point outside of it."),
            row(f"{GEO_INSTRUCTION}How large?{choices}", "Answer: 100°", image="geo3k/9.png"),
            row(f"<image> <image>\nHow large?{choices}", "Answer: A"),
            {"image": "geoqa_plus/1.png", "conversations": "none"},
        ],
    )


def math_puma(folder: Path):
    put(folder / "VarsityTutors/images/7.png")
    put(folder / "Synthesis/images/a/1.png")
    put(folder / "Synthesis/images/a/2.png")
    put_json(
        folder / "Synthesis/train.json",
        [
            {
                "image_url": "images/a/1.png",
                "instruction": "In triangle ABC, AB = 3 and BC = 4 and the angle at B is right. Find AC.",
                "output": r"By Pythagoras, $\boxed{5}$.",
                "image_url_2": "/home/somebody/data/Synthesis/images/a/2.png",
                "instruction_2": "<image>\nFind AC.",
                "output_2": r"By Pythagoras, AC is $\boxed{5}$.",
            },
            {"image_url": "images/a/1.png", "instruction": "Explain.", "output": "The sides are equal."},
            {"image_url": "", "instruction": "1+1?", "output": "The answer is 2."},
        ],
    )
    put_lines(
        folder / "VarsityTutors/train.jsonl",
        {
            "image_url": "images/7.png",
            "instruction": "Hint: Please answer with the letter.\nQuestion: Which one is it? A. five B. six C. seven",
            "output": "Since 5 + 1 = 6, the correct option is B.",
        },
        {
            "image_url": "images/7.png",
            "instruction": "Which one is it?\n(A) five\n(B) six",
            "output": "Answer: **six**",
        },
        {"image_url": "images/8.png", "instruction": "How many?", "output": "The answer is 3.5."},
        {"image_url": 7.5, "instruction": {"a": 1}, "output": "The answer is 3.5."},
    )


def docvqa(folder: Path):
    put(folder / "spdocvqa_images/xnbl0037_1.png")

    def row(number, question, answers, **more):
        return {
            "questionId": number, "question": question, "question_types": ["handwritten", "form"], "docId": 279,
            "image": "documents/xnbl0037_1.png", "ucsf_document_id": "xnbl0037", "ucsf_document_page_no": "1",
            "answers": answers, "data_split": "train",
        } | more  # fmt: skip

    put_json(
        folder / "spdocvqa_qas/train_v1.0_withQT.json",
        {
            "dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "train",
            "data": [
                row(337, "What is the date?", ["1/8/93", "January 8, 1993"]),
                row(338, "Who signed?", []),
                row(339, "Who else?", ["x"], image="documents/absent_1.png"),
                row(340, "How?", "x"),
            ],
        },
    )  # fmt: skip
    put_parquet(
        folder / "DocVQA/validation-00000-of-00001.parquet",
        [
            row("400", "Which letter?", ["C"], image={"bytes": image_bytes("blue"), "path": None}, data_split="val"),
            row("401", "Whose?", ["ITC"], image={"bytes": None, "path": None}, data_split="val"),
        ],
    )


def arxivqa(folder: Path):
    put(folder / "images/1501.00713_2.jpg")

    def row(number, options, label, **more):
        return {
            "id": f"cond-mat-{number}", "image": "images/1501.00713_2.jpg", "options": options, "label": label,
            "question": "What does the figure show?", "rationale": "Because.",
        } | more  # fmt: skip

    put_lines(
        folder / "arxivqa.jsonl",
        row(1, ["A) A line", "B) A circle", "C) A point"], "B"),
        row(2, ["A. A line", "B. A circle"], "A. A line"),
        row(3, ["A line", "A circle", "a point"], "A point"),
        row(4, ["A) A line", "B) A circle"], "E"),
        row(5, ["A) A line", "B) A line"], "A"),
        row(6, [], "A"),
        row(7, ["A) A line", "B)"], "A"),
        row(8, ["A) A line", "B) A circle"], "A", image="images/absent.jpg"),
        row(9, [1, 2.5], "B", question="How long is it?"),
        row(10, ["(a) up", "(b) down"], "(b)"),
        b"",
        row(11, None, "A"),
    )


def gsm8k(folder: Path):
    put_lines(
        folder / "train.jsonl",
        {"question": "Ann has 2 hens.\nHow many eggs?", "answer": "2*3=<<2*3=6>>6\n#### 6"},
        {"question": "How much?", "answer": "A lot.\n#### 1,234,567"},
        {"question": "How much?", "answer": "No mark: 5"},
        {"question": "How much?", "answer": "Nothing behind it\n#### "},
        {"question": 5, "answer": None},
    )
    put_lines(folder / "train_socratic.jsonl", {"question": "Again?", "answer": "#### 6"})
    put_lines(folder / "test.jsonl", {"question": "How far?", "answer": "#### -7.50"})


VIS_INSTRUCTION = (
    "\n\nYour response should only include the final answer (%s). Do not include any reasoning or explanation in your "
    "response."
)


def visonlyqa(folder: Path):
    put(folder / "val/images/CLEVR/CLEVR_val_003454.png")
    put(folder / "val/images/Chart/1.png")

    def row(row_id, prompt, answer, options, **more):
        return {
            "image_path": "images/CLEVR/CLEVR_val_003454.png", "question": None, "answer": answer,
            "prompt_reasoning": None, "prompt_no_reasoning": prompt + VIS_INSTRUCTION % ", ".join(options),
            "image_category": "3d", "task_category": "size", "question_type": "single_answer",
            "response_options": options, "source": "CLEVR", "id": row_id,
        } | more  # fmt: skip

    asked = "The cube is X times taller than the ball. Which is a reasonable estimate? (a) 0.5 (b) 1 (c) 2 "
    described = (
        "The following text provides information.\n\nObject 1: cube\n\nUsing the figure and above information, answer "
        "the following questions.\n\n\n\n"
    )
    letters = ["a", "b", "c"]
    put_lines(
        folder / "val/synthetic/3d__size.jsonl",
        row("one", asked, "c", letters),
        row("two", "There is no ball. True or False?\n\nA ball is round.", "False", ["True", "False"]),
        row("three", asked, "d", letters),
        row("four", "Which curve is highest, a, b, or c?", "b", letters),
        row("five", "List all balls.", "a,b", letters, question_type="multiple_answers"),
        row("six", asked, "a", letters, image_path="images/CLEVR/absent.png"),
    )
    put_lines(folder / "val/synthetic_with_text/text_3d__size.jsonl", row("text_one", described + asked, "c", letters))
    image = {"bytes": image_bytes("green"), "path": "1.png"}
    put_parquet(
        folder / "data/charts__extraction-00000-of-00001.parquet",
        [row("seven", asked, "a", letters, decoded_image=image, image_path="images/Chart/1.png")],
    )


def mathvision(folder: Path):
    for number in (4, 6, 357):
        put(folder / f"images/{number}.jpg")

    def row(number, question, options, answer, **more):
        return {
            "id": str(number), "question": question, "options": options, "image": f"images/{number}.jpg",
            "answer": answer, "solution": None, "level": 3, "subject": "counting",
        } | more  # fmt: skip

    first = row(4, "How many digits are there?\n<image1>", [], "6")
    put_lines(
        folder / "data/testmini.jsonl",
        first,
        row(6, "Which kitten is it? <image1>", ["(A)", "(B)", "(C)"], "B", level=None),
        row(357, "Like this <image1> or this <image2>?", ["$\\frac{1}{2}$", "A circle"], "A"),
        row(357, "Which of these?", ["<image1>", "<image2>"], "B", id="358"),
        row(7, "Where is it? <image1>", [], "6"),
        row(4, "Which one?", ["one", "two"], "C", id="9"),
    )
    more = {"image": "images/11.jpg", "decoded_image": {"bytes": image_bytes("black"), "path": None}}
    put_lines(folder / "data/test.jsonl", first)
    put_parquet(folder / "data/test-00000-of-00001.parquet", [row(11, "How many? <image1>", ["1", "2"], "A") | more])


MAKERS = {
    maker.__name__: maker
    for maker in (
        docci, pixmo_cap, orz_math, clevr_math, geoqa170k, math_puma, docvqa, arxivqa, gsm8k, visonlyqa, mathvision,
    )
}  # fmt: skip
