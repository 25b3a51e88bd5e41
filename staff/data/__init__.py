"""Data: a task's samples, their templates, and their tokens."""

from staff.data.samples import Sample as Sample
from staff.data.task import Task as Task
