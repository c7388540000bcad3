"""Does training the embedding repair what a smaller vocabulary costs? The dense model, trained alike, is the control.

    python benchmarks/embeddings.py NAME=CALIBRATION,TEST[::TEMPLATE]

Only the (tied) embedding matrix is trained, briefly, on windows of calibration text around tokens that went. What the
pruned model gains beyond the dense one is repair; what both gain is adaptation to the domain.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from torch import Tensor, nn
from vocabulary import parse_domain

import secateur
from secateur.corpus import read_documents
from secateur.demo import demo_recipe, prepare
from secateur.store.checkpoints import load_model, load_tokenizer, resolve_model
from secateur.store.tokenizers import encode

STEPS, BATCH, BEFORE, AFTER, RATE = 60, 16, 40, 24, 2e-4
TEST_DOCUMENTS, TEST_CHARACTERS = 300, 1500


def windows(tokenizer: Any, texts: list[str], keep: set[int], count: int) -> list[str]:
    """Return pieces of text around one token each that does not stay."""
    draw, found = random.Random(5), []
    draw.shuffle(texts)
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        gone = [index for index, token in enumerate(ids) if token not in keep]
        if gone:
            index = draw.choice(gone)
            last = min(len(ids), index + AFTER) - 1
            found.append(text[places[max(0, index - BEFORE)][0] : places[last][1]])
        if len(found) == count:
            break
    return found


def losses(model: Any, matrix: Tensor, batch: list[list[int]]) -> Tensor:
    """Return the nats of every predicted token of a batch, with ``matrix`` as embedding and head."""
    pad = nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(row) for row in batch], batch_first=True)
    real = pad([torch.ones(len(row)) for row in batch], batch_first=True).bool()
    embedded = nn.functional.embedding(ids, matrix)
    hidden = model.model(inputs_embeds=embedded, attention_mask=real.long())[0]
    logits = hidden[:, :-1][real[:, 1:]] @ matrix.T
    return nn.functional.cross_entropy(logits, ids[:, 1:][real[:, 1:]], reduction="none")


def trained(model: Any, matrix: Tensor, tokenizer: Any, texts: list[str]) -> Tensor:
    """Return the matrix after a brief training on the windows, nothing else of the model moving."""
    weight = nn.Parameter(matrix.clone())
    optimizer = torch.optim.AdamW([weight], lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 5) * (1 - step / STEPS)
        batch = [encode(tokenizer, text) for text in texts[step * BATCH : (step + 1) * BATCH]]
        optimizer.zero_grad()
        losses(model, weight, batch).mean().backward()
        optimizer.step()
    return weight.detach()


def total(model: Any, matrix: Tensor, tokenizer: Any, texts: list[str]) -> Tensor:
    """Return the summed nats of each text."""
    with torch.inference_mode():
        return torch.stack([losses(model, matrix, [encode(tokenizer, text)]).double().sum() for text in texts])


def main() -> None:
    """Measure dense and pruned, before and after training, and print the change in loss per byte."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("domain", metavar="NAME=CALIBRATION,TEST[::TEMPLATE]")
    _, corpus = parse_domain(parser.parse_args().domain)
    checkpoint = resolve_model(demo_recipe(prepare(), "runs/unused").model)
    model, dense_tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    counts = secateur.count_tokens(dense_tokenizer, corpus)
    budget = {"parameters": 0.14}
    plan = secateur.plan(model, tokenizer=dense_tokenizer, token_counts=counts, units=["vocabulary"], budget=budget)
    assert plan.vocabulary is not None
    keep = plan.vocabulary.keep
    texts = windows(dense_tokenizer, list(read_documents(corpus, "calibration")), set(keep), STEPS * BATCH)
    tests = list(read_documents(corpus, "test"))
    random.Random(1).shuffle(tests)
    tests = [text[:TEST_CHARACTERS] for text in tests[:TEST_DOCUMENTS]]
    dense = model.get_input_embeddings().weight.detach()
    models = {
        "dense": (dense, dense_tokenizer),
        "pruned": (dense[list(keep)], secateur.shrink_tokenizer(dense_tokenizer, plan)),
    }
    before = total(model, dense, dense_tokenizer, tests)
    for name, (matrix, tokenizer) in models.items():
        for how, weight in (("as it is", matrix), ("trained", trained(model, matrix, tokenizer, texts))):
            change = total(model, weight, tokenizer, tests) - before
            share = change.sum() / before.sum()
            error = (change - share * before).square().sum().sqrt() / before.sum()
            print(f"{name}, {how}: {100 * share:+.2f} % ± {100 * error:.2f} nats per byte against dense", flush=True)


if __name__ == "__main__":
    main()
