"""The built-in model's tokenizer: one token a word, its leading space included, digits in pairs.

Tokens concatenate to the text again, so that decoding is exact: `` Mary``, ``,``, ``\\n``, `` 17`` + ``32``.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<pad>", "<bos>", "<unk>")

# A run of double quotes stays whole; an indent keeps its last space for the word that follows it, as in GPT-2.
PATTERN = r' ?[0-9]{1,2}| ?[A-Za-z]+| ?"+| ?[^\sA-Za-z0-9]|\n| +(?= )| '


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A word-level tokenizer that knows exactly the tokens of ``texts``, in order of first appearance."""
    splitter = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    vocabulary: dict[str, None] = dict.fromkeys(SPECIAL)
    for text in texts:
        vocabulary.update(dict.fromkeys(token for token, _ in splitter.pre_tokenize_str(text)))
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
