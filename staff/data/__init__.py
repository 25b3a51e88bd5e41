"""Data: a task's samples, how they are read and rendered, and how a model reads them."""

from staff.data.task import Sample as Sample
from staff.data.task import Task as Task
