"""Small tokenizers of every kind that models ship, trained on generated sentences in many scripts; no download."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

KINDS = ("byte_level", "byte_level_partial", "llama3", "sentencepiece_bpe", "gemma", "unigram", "unigram_fallback")
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
DOMAIN_TOKEN = "<|dose|>"
"""An added token that is not special."""

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "\u2581"

_SYLLABLES = (
    "the pa tient re ceiv ed as pi rin be fore sur ge ry treat ment ing dos es age in su lin fu sion",
    "Be hand lung für äl te re Män ner grö ßer ca fé dé jà élè ve se ñor co ra zón łó dź żół ć",
    "αί μα για τρός ασ θε νής ρα πεί κα ρδιά",  # noqa: RUF001
    "па ци ент ле че ние боль ни ца кровь сер дце",  # noqa: RUF001
    "ال مر يض علا ج دو اء قلب مست شفى",
    "ה חו לה טי פול תרו פה בית ים",  # noqa: RUF001
    "患者 治 疗 医 院 心 臓 病 療 を した ます 환 자 치료",
)
_OTHERS = "🙂 🩺 💊 👩‍⚕️ 1 12 2024 37.5 mg/kg (iv) don't x=y; {json} if(a==b) return café cafe\u0301".split()
_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"


@cache
def training_texts() -> tuple[str, ...]:
    """Return the sentences that every tokenizer here is trained on; their words share syllables."""
    draw = random.Random(7)
    scripts = [line.split() for line in _SYLLABLES]
    words = ["".join(draw.choices(draw.choice(scripts), k=draw.randint(1, 4))) for _ in range(400)] + _OTHERS
    ends = [".", "?", "\n"]
    return tuple(" ".join(draw.choices(words, k=draw.randint(4, 12))) + draw.choice(ends) for _ in range(400))


@cache
def tiny_tokenizer(kind: str) -> Tokenizer:
    """Return a tokenizer of one of ``KINDS``; it puts <s> before a text and has special and other added tokens."""
    tokenizer = Tokenizer.from_str(json.dumps(_BUILDERS[kind]()))
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.add_tokens([DOMAIN_TOKEN])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    return tokenizer


def tokenizer_data(kind: str) -> dict[str, Any]:
    """Return the parsed tokenizer.json of a kind, a new copy each time."""
    data: dict[str, Any] = json.loads(tiny_tokenizer(kind).to_str())
    return data


def _byte_level(alphabet: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train_bpe(tokenizer, SPECIALS, 1000, alphabet)
    return tokenizer


def _full_bytes() -> dict[str, Any]:
    return _parsed(_byte_level(sorted(pre_tokenizers.ByteLevel.alphabet())))


def _partial_bytes() -> dict[str, Any]:
    return _parsed(_byte_level([]))


def _llama3() -> dict[str, Any]:
    """Return one with its special tokens at the end, and some tokens that only ``ignore_merges`` can produce."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train_bpe(tokenizer, (), 1000, sorted(pre_tokenizers.ByteLevel.alphabet()))
    data = _parsed(tokenizer)
    used = {part for merge in data["model"]["merges"] for part in merge}
    data["model"]["merges"] = [
        merge for place, merge in enumerate(data["model"]["merges"]) if place % 5 or "".join(merge) in used
    ]
    return data


def _sentencepiece_bpe() -> dict[str, Any]:
    """Return one with the merges of a converted SentencePiece model: every split of every token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    _train_bpe(tokenizer, ("<unk>", "<s>", "</s>", *BYTE_TOKENS), 1100, [])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    data = _parsed(tokenizer) | {"pre_tokenizer": None}
    vocab = data["model"]["vocab"]
    data["model"]["merges"] = [
        [piece[:cut], piece[cut:]]
        for piece in sorted(vocab, key=vocab.get)
        if piece not in BYTE_TOKENS
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    return data


def _gemma() -> dict[str, Any]:
    """Return one that knows runs of spaces both by merging and as added tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    _train_bpe(tokenizer, (*SPECIALS, *BYTE_TOKENS), 1100, ["\n"])
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    data = _parsed(tokenizer)
    vocab = data["model"]["vocab"]
    for symbol in (SPACE, "\n"):
        for half in (symbol, symbol * 2):
            vocab[half * 2] = len(vocab)
            data["model"]["merges"].append([half, half])
            data["added_tokens"].append(
                data["added_tokens"][0] | {"id": vocab[half * 2], "content": half * 2, "special": False}
            )
    return data


def _unigram() -> dict[str, Any]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    _train_unigram(tokenizer)
    return _parsed(tokenizer)


def _unigram_fallback() -> dict[str, Any]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    _train_unigram(tokenizer)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    data = _parsed(tokenizer) | {"pre_tokenizer": None}
    model = data["model"]
    model["byte_fallback"] = True
    model["vocab"][3:3] = [[token, 0.0] for token in BYTE_TOKENS]
    return data


def _train_bpe(tokenizer: Tokenizer, specials: Iterable[str], size: int, alphabet: Iterable[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(training_texts(), trainer)


def _train_unigram(tokenizer: Tokenizer) -> None:
    """Train a Unigram model whose first tokens are <unk>, <s> and </s>."""
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(training_texts(), trainer)


def _parsed(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer.json without byte tokens among the added ones: the trainer adds all its first tokens."""
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIALS]
    return data


_BUILDERS = {
    "byte_level": _full_bytes,
    "byte_level_partial": _partial_bytes,
    "llama3": _llama3,
    "sentencepiece_bpe": _sentencepiece_bpe,
    "gemma": _gemma,
    "unigram": _unigram,
    "unigram_fallback": _unigram_fallback,
}
