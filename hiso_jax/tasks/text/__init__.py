"""Text tasks for a language model: classification by answer words, and generation."""

from hiso_jax.tasks.text.answers import answers
from hiso_jax.tasks.text.choice import TextChoice, text_choice
from hiso_jax.tasks.text.generation import TextGeneration, text_generation
from hiso_jax.tasks.text.prompts import PROMPTS, SOURCES, Prompt, PromptSet, user_prompt
from hiso_jax.tasks.text.rewards import TextReward, text_reward
from hiso_jax.tasks.text.shapes import text_shapes
from hiso_jax.tasks.text.tasks import CLASSIFICATION, GENERATION, TEXT_TASKS, TextData, text_data, text_task

__all__ = [
    "CLASSIFICATION",
    "GENERATION",
    "PROMPTS",
    "SOURCES",
    "TEXT_TASKS",
    "Prompt",
    "PromptSet",
    "TextChoice",
    "TextData",
    "TextGeneration",
    "TextReward",
    "answers",
    "text_choice",
    "text_data",
    "text_generation",
    "text_reward",
    "text_shapes",
    "text_task",
    "user_prompt",
]
