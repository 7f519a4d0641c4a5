"""Ray Data LLM: its SGLang stage between its default stages, on a local Ray with six rows."""

from __future__ import annotations

import sys

import questions
import ray
import transformers
from ray.data.llm import SGLangEngineProcessorConfig, build_processor

import jaxserve

SAMPLING = {"temperature": 0.0, "max_new_tokens": 24}


def main(model: str, scratch: str) -> int:
    # The stage asks Ray for a GPU, whatever there is: this Ray says that it has one.
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, _temp_dir=f"{scratch}/ray")
    config = SGLangEngineProcessorConfig(
        model_source=model,
        engine_kwargs={"dtype": "float32", "max_total_tokens": 4096},
        concurrency=1,
        batch_size=6,
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {
            "messages": [{"role": "user", "content": row["question"]}],
            "sampling_params": SAMPLING,
        },
        postprocess=lambda row: {
            "question": row["question"],
            "answer": row["generated_text"],
            "tokens": row["num_generated_tokens"],
        },
    )
    rows = processor(ray.data.from_items([{"question": q} for q in questions.CHATS])).take_all()
    ray.shutdown()
    answers = {row["question"]: row["answer"] for row in rows}

    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float64")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    failures = 0
    print(f"\nray {ray.__version__}, jaxserve {jaxserve.VERSION}: {len(rows)} rows")
    for question in questions.CHATS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        output = reference.generate(ids, max_new_tokens=24, do_sample=False)
        expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        same = answers[question] == expected
        failures += not same
        print(f"{'same' if same else 'DIFFERENT':<10}{question!r}: {answers[question]!r}")
        if not same:
            print(f"{'':<10}transformers, float64: {expected!r}")
    print("FAILED" if failures else "passed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
