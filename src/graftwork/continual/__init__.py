"""Continual learning: tasks one after another, no samples kept, no task named at test time.

scenario = by_classes(train, test, groups=5)
result = run(scenario, TaskAdapters(model, gw.LoRA(rank=4)), Learning(epochs=5), folder="runs/digits")
"""

from graftwork.continual.learning import Learning
from graftwork.continual.method import Method
from graftwork.continual.metrics import average_accuracy, backward_transfer, forgetting, incremental_accuracy
from graftwork.continual.pool import AdapterPool, Pool
from graftwork.continual.prompt_pool import PromptPool
from graftwork.continual.run import Result, accuracy, run
from graftwork.continual.samples import Samples
from graftwork.continual.scenario import Scenario, Stage, by_classes, by_domains
from graftwork.continual.sequential import Sequential
from graftwork.continual.task_adapters import TaskAdapters

__all__ = [
    "AdapterPool",
    "Learning",
    "Method",
    "Pool",
    "PromptPool",
    "Result",
    "Samples",
    "Scenario",
    "Sequential",
    "Stage",
    "TaskAdapters",
    "accuracy",
    "average_accuracy",
    "backward_transfer",
    "by_classes",
    "by_domains",
    "forgetting",
    "incremental_accuracy",
    "run",
]
