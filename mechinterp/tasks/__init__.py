"""The four tasks of the circuits literature, generated for any tokenizer: `(model, n_prompts, seed) -> Task`."""

from mechinterp.tasks.colored_objects import colored_objects
from mechinterp.tasks.docstring import docstring
from mechinterp.tasks.greater_than import greater_than
from mechinterp.tasks.ioi import ioi

TASKS = {"ioi": ioi, "greater-than": greater_than, "colored-objects": colored_objects, "docstring": docstring}
