"""A sweep as a straightforward script with plain Ray Tune: function trainable, OptunaSearch, ASHA, defaults otherwise.

ASHA's grace period is the number of epochs: every trial is trained to its end, as on the other side.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import plain
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch


def objective(config: dict, options) -> None:
    torch.set_num_threads(1)
    train, val = plain.loaders(options)
    model = plain.build(options, config["latent_channels"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"])
    for _ in range(options.epochs):
        began = time.time()
        plain.train_epoch(model, optimizer, train)
        mse = plain.validate(model, val)
        plain.told(options, tune.get_context().get_trial_id(), began)
        with tempfile.TemporaryDirectory() as folder:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, Path(folder) / "state.pt")
            tune.report({"mse": mse}, checkpoint=tune.Checkpoint.from_directory(folder))


def main() -> None:
    options = plain.parse("A sweep with plain Ray Tune.")
    tuner = tune.Tuner(
        partial(objective, options=options),
        param_space={"latent_channels": tune.randint(4, 17), "learning_rate": tune.loguniform(1e-4, 1e-2)},
        tune_config=tune.TuneConfig(metric="mse", mode="min", num_samples=options.trials, search_alg=OptunaSearch(),
                                    max_concurrent_trials=options.slots,
                                    scheduler=ASHAScheduler(max_t=options.epochs, grace_period=options.epochs)),
        run_config=tune.RunConfig(storage_path=str(options.output / "results")))
    best = tuner.fit().get_best_result()
    print(best.config, best.metrics["mse"])


if __name__ == "__main__":
    main()
