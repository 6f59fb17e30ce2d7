"""Put a model's weights on a 4-bit grid by GPTQ, with llmcompressor, for `bench/roste.py`.

    python -m venv gptq && gptq/bin/pip install -c constraints.txt llmcompressor==0.14.0.1
    gptq/bin/python bench/roste_gptq.py --model DIR --data train.jsonl --output DIR

Weights asymmetric, one scale an output row, as RoSTE's; 128 calibration examples. What is written
is a plain model folder, the weights rounded and dequantised. Runs without tinyft, whose
transformers is another.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EXAMPLES = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = [json.loads(line) for line in arguments.data.read_text().splitlines()[:EXAMPLES]]
    texts = [
        row["prompt"] + (row["choices"][row["answer"]] if "choices" in row else row["completion"])
        for row in rows
    ]
    encoded = [dict(tokenizer(text, truncation=True, max_length=160)) for text in texts]
    scheme = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel"},
    }
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(
        model=model,
        dataset=Dataset.from_list(encoded),
        recipe=recipe,
        num_calibration_samples=len(encoded),
        max_seq_length=160,
    )
    grids = [len(m.weight[0].unique()) for n, m in model.named_modules() if n.endswith("q_proj")]
    assert max(grids) <= 16, f"a row of {max(grids)} values is on no 4-bit grid"
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    found = model.state_dict()
    dense.load_state_dict({name: found[name] for name in dense.state_dict()})
    dense.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
