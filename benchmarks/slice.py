"""A slice of a billion tokens through Llama-3-8B: whitened rows of rank 64 in one bit, on disk and as planned.

The slice is one decoder layer of the real widths (7 of 224 linears) with random weights, on random tokens: its rows
have the size that those of a trained one have. Bytes on disk, records and shard headers included, times 32 layers and
1,953,125 sequences of 512 tokens; LogIX's published log of as many tokens takes 3.5 TB.
"""

import tempfile
import time

import torch
from _common import Parser, silent, summed_loss, write

import loghook

LAYERS, SEQUENCES, TOKENS, LOGIX = 32, 1_953_125, 512, 3.5e12


def decoder_layer(widths: tuple[int, int, int, int]) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, heads, kv_heads = widths
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=kv_heads, num_hidden_layers=1, max_position_embeddings=TOKENS,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def main() -> None:
    made = Parser(__doc__, threads=2)
    made.add_argument("--samples", type=int, default=16)
    made.add_argument("--rank", type=int, default=64)
    made.add_argument("--dtype", default="int1")
    made.add_argument("--tiny", action="store_true", help="small widths: a test of the script")
    a = made.start()
    model = decoder_layer((64, 128, 4, 2) if a.tiny else (4096, 14336, 32, 8))
    tokens = torch.randint(0, 1024, (a.samples, 16 if a.tiny else TOKENS), generator=torch.Generator().manual_seed(0))
    seconds = {}
    with tempfile.TemporaryDirectory() as folder, loghook.frozen(model):
        run = loghook.init(f"{folder}/log", rank=16 if a.tiny else a.rank, projection="whitened", dtype=a.dtype)
        with silent():
            run.watch(model)
        plan = run.plan(samples=SEQUENCES, tokens=TOKENS)
        for current in run.passes():
            start = time.perf_counter()
            for i in range(0, a.samples, 2):
                with run(data_id=list(range(i, min(i + 2, a.samples)))):
                    summed_loss(model, tokens[i : i + 2]).backward()
            seconds[current.kind] = time.perf_counter() - start
        run.finalize()
        run.close()
        log = loghook.load(f"{folder}/log")
        rows = sum(file.stat().st_size for file in log.path.glob("rows-*.safetensors")) / len(log)
        records = sum(file.stat().st_size for file in log.path.glob("commits-*.jsonl")) / len(log)
        problems = log.verify()
    assert not problems, problems
    measured, planned = (rows * LAYERS + records) * SEQUENCES, plan.row_bytes() * LAYERS * SEQUENCES
    print(f"{len(log)} rows of {log.layout.width:,} values, {len(log.layers)} layers: {rows:,.0f} bytes a row on disk")
    print(f"records: {records:,.0f} bytes a row; seconds {seconds}")
    print(f"{LAYERS} such layers, {SEQUENCES:,} rows: {measured / 1e12:.4f} TB measured, {planned / 1e12:.4f} planned")
    print(f"LogIX's 3.5 TB are {LOGIX / measured:.1f} times as much")
    if a.save:
        write(
            "slice",
            {
                "samples": len(log), "rank": a.rank, "dtype": a.dtype, "row_bytes": rows,
                "record_bytes": records, "measured_bytes": measured, "planned_bytes": planned, "seconds": seconds,
            },
        )  # fmt: skip


if __name__ == "__main__":
    main()
