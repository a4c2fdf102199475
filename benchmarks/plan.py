"""Plans of rounds on accelerators that are not here, by ``hiso-jax plan``, as one table.

    pip install -e '.[tpu]' && python benchmarks/plan.py --targets v5p:1x1x1 v5e:2x4 v5p:4x8x8
    pip install -e '.[cuda]' && python benchmarks/plan.py --targets h100:1x1x1 h100:1x1x8

Only compilers are needed. Targets whose compiler is not installed are left out, and the command's error is printed.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

TEXT = "--task sst2 --trainable all --clients 600 --batch-size 16 --max-length 64"
BFLOAT16 = "--dtype bfloat16 --param-dtype bfloat16 --curvature-dtype bfloat16 --directions regenerate"
# Options, layers, and the number of devices over which a target splits the parameters: as many as the model needs on so
# few chips, or a choice.
MODELS = {
    "MNIST's CNN": ("--task mnist --clients 5000 --cohort 1024", 1, {}),
    "OPT-125M": (f"{TEXT} --model opt-125m --cohort 8", 12, {"v5e:2x4": 2, "h100:1x1x8": 2}),
    "Llama-7B, bfloat16": (
        f"{TEXT} --model llama-7b --cohort 8 {BFLOAT16}", 32, {"v5e:2x4": 8, "v5p:4x8x8": 4, "h100:1x1x8": 2},
    ),
}  # fmt: skip
TARGETS = ("h100:1x1x1", "h100:1x1x8", "v5p:1x1x1", "v5e:2x4", "v5p:4x8x8")


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      targets: devices, as hiso-jax plan takes them.
      out: JSON file to write; its entries of other targets stay.
    """

    targets: tuple[str, ...] = TARGETS
    out: Path = Path("benchmarks/results/plan.json")


def planned(options, target, shards):
    words = [*options.split(), "--target", target, "--model-shards", str(shards), "--json"]
    if target == "v5p:4x8x8":
        words[words.index("--cohort") + 1] = "1024" if "mnist" in words else "256"
    command = [sys.executable, "-m", "hiso_jax.cli.main", "plan", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Arguments) -> None:
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for target in arguments.targets:
        for name, (options, _, shards) in MODELS.items():
            made = planned(options, target, shards.get(target, 1))
            if "error" in made:
                print(f"{name} on {target}: {made['error']}", file=sys.stderr)
                continue
            known[f"{name} on {target}"] = made
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(known, indent=1) + "\n")
    table = Table(title="A round, of one device")
    headings = (
        "",
        "mesh",
        "GB",
        "of",
        "across clients",
        "a layer and evaluation",
        "FLOPs of floor",
        "traffic",
        "estimate",
    )
    for heading in (*headings, "walls", "copies"):
        table.add_column(heading, justify="right")
    for name, made in known.items():
        layers = MODELS[name.split(" on ")[0]][1]
        own = [m for m in made["messages"] if m["axes"] == "model"]
        sums = " + ".join(f"{m['count'] / layers / 6:.2f} {m['kind']}" for m in own)
        table.add_row(
            name,
            "×".join(map(str, made["mesh"].values())),
            f"{made['memory']['total'] / 1e9:.1f}",
            f"{made['memory']['usable'] / 1e9:.1f}",
            f"{sum(m['bytes'] for m in made['messages'] if m['axes'] == 'clients')} B",
            sums,
            f"{made['floor_ratio']:.3f}",
            f"{made['bytes_moved'] / 1e9:.0f} GB",
            f"{made['seconds']['round'] * 1e3:.3g} ms",
            f"{made['pins'][1]} of {made['pins'][0]}",
            str(len(made["copies"])),
        )
    Console(width=200).print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
