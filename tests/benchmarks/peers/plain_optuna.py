"""The same sweep with plain Optuna: as many processes as slots, which share a study in a journal file."""

from __future__ import annotations

import multiprocessing
import time

import optuna
import plain
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback


def objective(trial: optuna.Trial, options) -> float:
    train, val = plain.loaders(options)
    model = plain.build(options, trial.suggest_int("latent_channels", 4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True))
    for epoch in range(1, options.epochs + 1):
        began = time.time()
        plain.train_epoch(model, optimizer, train)
        mse = plain.validate(model, val)
        plain.told(options, trial.number, began)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                   options.output / f"trial_{trial.number}.pt")
        trial.report(mse, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return mse


def study_of(options) -> optuna.Study:
    """ASHA's grace period is the number of epochs, as in the other plain script."""
    storage = JournalStorage(JournalFileBackend(str(options.output / "journal.log")))
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=options.epochs)
    return optuna.create_study(study_name="peer", storage=storage, pruner=pruner, load_if_exists=True)


def work(options) -> None:
    torch.set_num_threads(1)
    study_of(options).optimize(lambda trial: objective(trial, options),
                               callbacks=[MaxTrialsCallback(options.trials, states=None)])


def main() -> None:
    options = plain.parse("A sweep with plain Optuna in processes.")
    study_of(options)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(options,)) for _ in range(options.slots)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(study_of(options).best_params)


if __name__ == "__main__":
    main()
