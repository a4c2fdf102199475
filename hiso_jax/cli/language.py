"""The options of language models: prompts, what is trained, and in which precision."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args

from hiso_jax.checks import ParameterError, positive, whole
from hiso_jax.cli.arguments import Listed

TEXT_TASK_NAMES = Literal[
    "sst2",
    "qqp",
    "rte",
    "boolq",
    "cb",
    "wic",
    "wsc",
    "multirc",
    "ag_news",
    "squad",
    "drop",
    "xsum",
    "text-classification",
]

# As hiso_jax.tasks.text has them, which would import the language models to parse a command line.
GENERATES = ("squad", "drop", "xsum")


@dataclass(frozen=True, kw_only=True)
class Language:
    """What only language models have.

    Attributes:
      prompts: whose prompts and answer words: those of DeComFL and HiSo, or of MeZO; their numbers of rows, rates and
        weight decay are options of their own.
      revision: branch, tag or commit of a hub's model; converted takes the pull request of the hub's converter, which
        has the safetensors that old checkpoints lack.
      template: the prompt, with columns of the data in braces, for text-classification or in place of the task's.
      verbalizer: the answer word of each label, in their order, blanks included; as template.
      labels: the label of each answer word, in their order, for data whose labels are text; by default alphabetical.
      max_length: most tokens of a prompt, longer ones keep their end; by default the task's or the model's.
      max_new_tokens: most tokens to generate (squad, drop, xsum); by default the task's.
      train_rows: random rows of the training data to use; by default all, for generation 1,000.
      test_rows: random rows of the test data to use; by default all, for generation 100.
      trainable: all parameters, lora, prefix, head, or a regular expression over the parameters' dotted paths.
      lora_rank: rank r of LoRA.
      lora_alpha: α of LoRA, whose product is scaled by α/r.
      lora_targets: projections that get LoRA, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
      prefix_tokens: learned prefix positions.
      dtype: in which the model computes; losses are float32 in any case.
      param_dtype: in which parameters are kept; bfloat16 is rounded stochastically, so that no update is lost.
    """

    prompts: Literal["decomfl", "mezo"] = "decomfl"
    revision: str | None = None
    template: str | None = None
    verbalizer: Annotated[tuple[str, ...] | None, Listed(str, "WORD,WORD,…", strip=False)] = None
    labels: Annotated[tuple[str, ...] | None, Listed(str, "NAME,NAME,…")] = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    train_rows: int | None = None
    test_rows: int | None = None
    trainable: str = "all"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: Annotated[tuple[str, ...], Listed(str, "A,B,…")] = ("q_proj", "v_proj")
    prefix_tokens: int = 5
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"

    def check_language(self, task: str) -> None:
        """Check every range, and that no option is given that ``task`` would not heed.

        Raises:
          ValueError: naming the first option out of range or place.
        """
        given = [field.name for field in fields(Language) if getattr(self, field.name) != field.default]
        heeded = {field.name for field in fields(Language)}
        if task not in get_args(TEXT_TASK_NAMES):
            heeded = set()
        elif task in GENERATES:
            heeded -= {"template", "verbalizer", "labels"}
        else:
            heeded -= {"max_new_tokens"} | ({"prompts"} if task == "text-classification" else set())
        heeded -= set() if self.trainable == "lora" else {"lora_rank", "lora_alpha", "lora_targets"}
        heeded -= set() if self.trainable == "prefix" else {"prefix_tokens"}
        for option in given:
            if option not in heeded:
                tuned = f" and --trainable {self.trainable}" if option.startswith(("lora", "prefix")) else ""
                raise ParameterError(option, f"has no meaning for --task {task}{tuned}")
        for option in ("max_length", "max_new_tokens", "train_rows", "test_rows", "lora_rank", "prefix_tokens"):
            if getattr(self, option) is not None:
                whole(option, getattr(self, option), 1)
        positive("lora_alpha", self.lora_alpha)
