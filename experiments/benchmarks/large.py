"""A language model of LLaMA-7B's width, quantized, compensated, saved and opened again: the memory that it takes.

``python -m experiments.benchmarks.large [--quick] [--out results/benchmarks] [--blocks 32] [--folder DIR]`` appends to
``large.csv``. The model has random fp16 weights in safetensors files, as a downloaded one: 2.1 GB with the default of 4
blocks, 13.5 GB with LLaMA-7B's 32, and its checkpoints less than half of that; all are removed in the end.

Memory is what the process itself holds (``RssAnon`` of Linux), in GiB over what its libraries take. Pages of files that
are mapped, the float weights among them, are not counted: the system drops them where it needs the room.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import bc
from experiments.benchmarks import measure

MODULE = "experiments.benchmarks.large"
LLAMA_7B = {"width": 4096, "inner": 11008, "heads": 32, "vocabulary": 32000}
SMALL = {"width": 64, "inner": 128, "heads": 2, "vocabulary": 256}
SETTINGS = (("rtn", "w4g128", "sink"), ("gptq", "w3g128", "sink"), ("billm", "w1", "sink"))
TOKENS = (2, 32)  # samples and their length: enough to run all code, for memory of activations is not what is asked
SPREAD = 0.02  # of the weights


def write_model(folder: Path, blocks: int, width: int, inner: int, heads: int, vocabulary: int) -> float:
    """Write a LLaMA of random fp16 weights as hubs keep them, a file for each block; returns its GiB."""
    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        tie_word_embeddings=False,
        dtype="float16",
    )
    config.save_pretrained(folder)
    index: dict[str, str] = {}

    def put(name: str, shapes: dict[str, tuple[int, ...]]) -> int:
        tensors = {key: (torch.randn(shape) * SPREAD).half() for key, shape in shapes.items() if len(shape) > 1}
        tensors |= {key: torch.ones(shape, dtype=torch.float16) for key, shape in shapes.items() if len(shape) == 1}
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    ends = {"model.embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width), "model.norm": (width,)}
    size = put("ends.safetensors", {f"{name}.weight": shape for name, shape in ends.items()})
    for i in range(blocks):
        shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
        shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        shapes |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        named = {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}
        size += put(f"block-{i:02d}.safetensors", named)
    listing = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing), encoding="utf8")
    return size / 2**30


def quantized(folder: str, checkpoint: str, quantizer: str, bits: str, preset: str) -> dict[str, float]:
    """Quantize, compensate and save; peak GiB and CPU seconds."""
    started = time.process_time()
    with measure.own_memory() as memory:
        model = bc.load(folder, dtype="float16")
        report = bc.quantize(model, quantizer, bits, preset, calibration=_ids(), device="cpu")
        path = bc.save(model, checkpoint)
    return {
        "own_gib": memory.peak_gib,
        "cpu_seconds": time.process_time() - started,
        "checkpoint_gib": path.stat().st_size / 2**30,
        "bits_per_weight": report.bits_per_weight,
    }


def opened(checkpoint: str) -> dict[str, float]:
    """Open a checkpoint and run it once; peak GiB and CPU seconds."""
    started = time.process_time()
    with measure.own_memory() as memory, torch.no_grad():
        model = bc.open(checkpoint)
        model(input_ids=_ids())
    return {"own_gib": memory.peak_gib, "cpu_seconds": time.process_time() - started}


def _ids() -> torch.Tensor:
    return torch.randint(4, 200, TOKENS, generator=torch.Generator().manual_seed(1))


def rows(folder: Path, shape: dict[str, int], blocks: int) -> Iterator[dict[str, Any]]:
    """What each setting takes to be made and to be opened, a row each."""
    size = write_model(folder / "float", blocks, **shape)
    for quantizer, bits, preset in SETTINGS:
        checkpoint = folder / quantizer
        setting = {"quantizer": quantizer, "bits": bits, "preset": preset}
        arguments = {"folder": str(folder / "float"), "checkpoint": str(checkpoint), **setting}
        made = measure.run(f"{MODULE}:quantized", arguments, 1)[0]["result"]
        read = measure.run(f"{MODULE}:opened", {"checkpoint": str(checkpoint)}, 1)[0]["result"]
        shutil.rmtree(checkpoint)
        case = {"blocks": blocks, "width": shape["width"], "tokens": TOKENS[0] * TOKENS[1], "float_gib": size}
        for stage, result in (("quantize and save", made), ("open and run", read)):
            yield case | setting | {"stage": stage, **made, **result, "own_over_float": result["own_gib"] / size}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and write its file; returns 0."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder of the CSV file")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the model; LLaMA-7B has 32")
    parser.add_argument("--folder", type=Path, help="where the models' files go for a while; the system's by default")
    options = parser.parse_args(arguments)
    shape, blocks = (SMALL, 2) if options.quick else (LLAMA_7B, options.blocks)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="large-model-") as name:
        for row in rows(Path(name), shape, blocks):  # each is kept as soon as it is measured
            measure.report(options.out / "large.csv", [row])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
