"""lm-evaluation-harness: its `sglang` backend beside its `hf` backend, on the same weights.

Equal accuracies, the same texts, log-likelihoods within TOLERANCE of a float64 reference.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import questions

TOLERANCE = 2e-4
"""Nats, of a whole continuation's log-likelihood; ours computes in float32."""
ALIAS = ["-m", "jaxserve.sglang_alias"]
MULTIPLE_CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: ""
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 32, do_sample: false}
metric_list: [{metric: bypass}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""


def write_tasks(folder: Path) -> None:
    """Task files and their data, as a user of the harness writes them."""
    choices = [{"question": q, "choices": c, "answer": a} for q, c, a in questions.CHOICES]
    needle = {"question": questions.long_context(), "choices": questions.NEEDLE_CHOICES}
    texts = [{"question": text} for text in questions.CONTINUATIONS]
    for name, kind, rows in (
        ("choices", MULTIPLE_CHOICE, choices),
        ("long", MULTIPLE_CHOICE, [needle | {"answer": 0}]),
        ("texts", GENERATE, texts),
        ("rolling", ROLLING, texts),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n{kind}"
        )


def evaluate(python: list[str], options: list[str], tasks: Path, out: Path) -> None:
    """Runs the harness's command line, which writes its results into `out`."""
    command = [
        sys.executable, *python, "-m", "lm_eval", "run", *options,
        "--tasks", "choices,long,texts,rolling", "--include_path", str(tasks),
        "--output_path", str(out), "--log_samples",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=3000)


def read(out: Path) -> Any:
    """The results, and by task the samples in order."""
    [results] = out.rglob("results_*.json")
    samples = {}
    for file in out.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        name = file.name.removeprefix("samples_").rsplit("_", 1)[0]
        samples[name] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(results.read_text())["results"], samples


def likelihoods(rows: list[Any]) -> list[float]:
    """Those of every choice, or of every text; `resps` holds strings or numbers, by version."""
    found = []
    for row in rows:
        for answer in row["resps"]:
            while isinstance(answer, list):
                answer = answer[0]
            found.append(float(answer))
    return found


def main(model: str, scratch: str) -> int:
    tasks, theirs, ours = (Path(scratch, name) for name in ("tasks", "hf", "sglang"))
    tasks.mkdir()
    write_tasks(tasks)
    float64 = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float64"]
    evaluate([], float64, tasks, theirs)
    float32 = ["--model", "sglang", "--model_args", f"pretrained={model},dtype=float32"]
    evaluate(ALIAS, [*float32, "--batch_size", "auto"], tasks, ours)
    return compare(theirs, ours)


def compare(theirs: Path, ours: Path) -> bool:
    """Prints both sides; whether something differs that must not."""
    (hf, hf_rows), (ours_results, our_rows) = read(theirs), read(ours)
    failures = []
    print(f"\n{'lm_eval':<28}{'hf, float64':>14}{'sglang: ours':>14}")
    for task in ("choices", "long"):
        pair = [results[task]["acc,none"] for results in (hf, ours_results)]
        print(f"{'accuracy, ' + task:<28}{pair[0]:>14.4f}{pair[1]:>14.4f}")
        if pair[0] != pair[1]:
            failures.append(f"accuracy of {task}")
    for task in ("choices", "long", "rolling"):
        theirs, mine = (likelihoods(rows[task]) for rows in (hf_rows, our_rows))
        apart = max(abs(a - b) for a, b in zip(theirs, mine, strict=True))
        print(f"{len(mine):>4} log-likelihoods, {task:<14} at most {apart:.1e} apart")
        if apart > TOLERANCE:
            failures.append(f"log-likelihoods of {task}")
    texts = [[row["resps"][0][0] for row in rows["texts"]] for rows in (hf_rows, our_rows)]
    same = sum(a == b for a, b in zip(*texts, strict=True))
    print(f"{same:>4} of {len(texts[0])} texts identical")
    for theirs, mine in zip(*texts, strict=True):
        if theirs != mine:
            print(f"     hf: {theirs!r}\n   ours: {mine!r}")
            failures.append("texts")
    print("FAILED: " + ", ".join(failures) if failures else "passed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
