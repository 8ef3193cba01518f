"""Who has the devices: trainer and engine side by side, or in turns where they share them."""

from __future__ import annotations

from capcur_jax.learner.trainer import Trainer
from capcur_jax.rollout.engine import Engine


class Turns:
    """Hands weights from the trainer to the engine and, where `shared`, the devices back and forth
    (config.rollout.sglang.colocate)."""

    def __init__(self, trainer: Trainer, engine: Engine, shared: bool):
        self._trainer, self._engine, self.shared = trainer, engine, shared

    def begin_stage(self) -> None:
        """The devices are the trainer's while its state is made and its programs are compiled."""
        if self.shared:
            self._engine.release()

    def begin_update(self) -> None:
        """Gives the devices back to the trainer."""
        if self.shared and self._trainer.away:
            self._engine.release()
            self._trainer.enter()

    def hand_over(self, version: int) -> dict[str, float]:
        """Gives the devices and the present weights to the engine, which samples under `version` from now on.

        Where the devices are shared, the trainer's arrays go to the host first. Returns the seconds that the weights
        took, by phase.
        """
        if self.shared:
            self._trainer.leave()
            self._engine.resume()
        return self._engine.update_weights(self._trainer.parameters(), version)
