"""The peers on our tasks: do their EK-FAC scores agree with ours and an independent one, and how well do they predict?

`make peers` installs them first; without, every row says so. See benchmarks/peers/README.md for the conventions.
"""

import tempfile
from pathlib import Path
from typing import Any

import digits
import torch
from _common import Parser, llama, write
from peers import driver, reference
from peers.exchange import Options, read
from peers.exchange import write as hand_over

from loghook.evaluate.lds import lds

DIGITS = [
    *((peer, {"method": "ekfac"}) for peer in ("kronfluence", "bergson", "dattri")),
    *((peer, {"method": "ekfac", "damping": 1e-8, "absolute": True}) for peer in ("kronfluence", "bergson", "dattri")),
    *((peer, {"method": "kfac"}) for peer in ("kronfluence", "bergson", "dattri")),
    *((peer, {"method": m, "rank": 32}) for peer in ("bergson", "dattri", "logix") for m in ("fisher", "dot")),
    *((peer, {"method": "cosine", "rank": 32}) for peer in ("bergson", "dattri")),
    ("dattri", {"method": "ekfac", "rank": 32}),
    ("logix", {"method": "ekfac", "rank": 32}),
]


def digits_folder(folder: Path, hidden: int = 128, sampled: bool = True) -> Path:
    """Write the digits task of one model trained on all of them; with labels sampled from it for the Fisher matrix."""
    data = digits.digits()
    model = digits.models(data, digits.Recipe(hidden=hidden), 1)[0]
    labels = None
    if sampled:
        with torch.no_grad():
            labels = torch.distributions.Categorical(logits=model(data.x)).sample()
    hand_over(folder, model, {"x": data.x, "y": data.y}, {"x": data.query_x, "y": data.query_y}, labels)
    return folder


def llama_folder(
    folder: Path, *, hidden: int = 64, layers: int = 2, samples: int = 40, queries: int = 5, tokens: int = 24,
    vocabulary: int = 256, sampled: bool = True,
) -> Path:  # fmt: skip
    """Write a random Llama with random sequences, and labels sampled from it for the Fisher matrix."""
    model = llama(hidden, layers, vocabulary).eval()
    ids = torch.randint(0, vocabulary, (samples + queries, tokens))
    labels = None
    if sampled:
        with torch.no_grad():
            drawn = torch.distributions.Categorical(logits=model(ids[:samples]).logits[:, :-1]).sample()
        labels = torch.cat([ids[:samples, :1], drawn], 1)
    sides = [{"input_ids": part, "labels": part.clone()} for part in (ids[:samples], ids[samples:])]
    hand_over(folder, model, *sides, labels)
    return folder


def agree(folder: Path, batch: int, threads: int) -> list[dict[str, Any]]:
    """Compare each peer's EK-FAC with the slow one, at equal labels and damping."""
    rows = []
    exchange = read(folder)
    for damping, absolute in ((0.1, False), (1e-8, True)):
        slow = {
            positions: reference.ekfac(exchange, damping, absolute=absolute, positions=positions, single=True)
            for positions in (("all",) if exchange.kind == "mlp" else ("all", "but last"))
        }
        for peer in ("kronfluence", "bergson", "dattri"):
            options = Options(
                method="ekfac", damping=damping, absolute=absolute, batch=batch, query_batch=batch, threads=threads
            )
            outcome = driver.run(peer, folder, options)
            row: dict[str, Any] = {"peer": peer, "damping": damping, "absolute": absolute, "reason": outcome.reason}
            if outcome.scores is not None:
                row |= {name: reference.agreement(outcome.scores, values) for name, values in slow.items()}
                row["slope"] = float((outcome.scores * slow["all"]).sum() / (slow["all"] ** 2).sum())
            rows.append(row)
    return rows


def show(row: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value}" for key, value in row.items() if value != "")


def judge(folder: Path, threads: int) -> list[dict[str, Any]]:
    """Run every case on the digits task; LDS against its truth, seconds, memory, bytes."""
    truth, rows = digits.load(), []
    for peer, asked in DIGITS:
        outcome = driver.run(peer, folder, Options(**asked, batch=200, query_batch=200, threads=threads))
        row: dict[str, Any] = {"peer": peer} | asked
        if outcome.reason:
            row["reason"] = outcome.reason
        else:
            measured = lds(outcome.scores, truth.members, truth.losses)
            row |= {"lds": round(measured.mean, 3), "seconds": round(outcome.seconds, 2)}
            row |= {key: round(outcome.about[key]) for key in ("peak_mb", "before_mb", "bytes_per_sample")}
        rows.append(row)
        print("  " + show(row))
    return rows


def main() -> None:
    a = Parser(__doc__).start()
    torch.manual_seed(0)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder, batch in (
            ("digits", digits_folder(Path(scratch) / "digits"), 200),
            ("llama", llama_folder(Path(scratch) / "llama"), 8),
        ):
            print(f"\nEK-FAC, {name}: Pearson with the slow one (mean, least over queries)")
            result[f"agreement, {name}"] = agree(folder, batch, a.threads)
            print("\n".join("  " + show(row) for row in result[f"agreement, {name}"]))
        print("\ndigits, one model, Fisher matrix from the training labels")
        result["digits"] = judge(digits_folder(Path(scratch) / "empirical", sampled=False), a.threads)
    if a.save:
        write("peers_check", result)


if __name__ == "__main__":
    main()
