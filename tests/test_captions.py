"""Images with captions: rendered ones, folders of a user's, and how a caption becomes numbers."""

import gzip
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import error_line, small_args, write_folder
from PIL import Image

import captions
import clip
import common
from captions import GROUNDS, NOUNS, SHAPES, Tokenizer, captioned_patterns, learn_merges
from common import PATTERNS


def texts_of_every_kind(n=60):
    """Letters that repeat, other alphabets, signs of several bytes, digits, contractions."""
    parts = (
        "aaa abab ab banana Naïve 日本語 日本 🙂🙂 don't we'll 2026 3.14 ... !!! a_b é ß x²".split()
    )
    order = torch.randint(len(parts), (n, 6), generator=common.make_generator("texts"))
    return [" ".join(parts[i] for i in row) for row in order.tolist()]


# ----------------------------------------------------------------------------------- vocabulary
def gpt2_symbols():
    """The table of GPT-2's official code, which CLIP has taken over: {byte: character}."""
    kept = list(range(ord("!"), ord("~") + 1))
    kept += list(range(ord("¡"), ord("¬") + 1))
    kept += list(range(ord("®"), ord("ÿ") + 1))
    table = {byte: chr(byte) for byte in kept}
    others = [byte for byte in range(256) if byte not in kept]
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


def test_the_vocabulary_is_that_of_clip():
    """256 bytes, the same at a word's end, the merges, start, end."""
    symbols = list(gpt2_symbols().values())
    merges = [("a", "b</w>"), ("b", "a")]
    tokenizer = Tokenizer(merges, 8)
    expected = [*symbols, *(symbol + "</w>" for symbol in symbols), "ab</w>", "ba"]
    assert list(tokenizer.ids) == expected
    assert list(tokenizer.ids.values()) == list(range(514))
    assert tokenizer.start == 514
    assert tokenizer.end == 515
    assert tokenizer.vocabulary == 516


def test_ids_are_those_of_clip():
    """Of single characters, which need no merge: "a" is 320 and "!" 256 (official code)."""
    tokenizer = Tokenizer([], 8)
    assert tokenizer.encode("A !") == [512, 320, 256, 513]
    assert tokenizer.encode("!!") == [512, 0, 256, 513]
    assert tokenizer(["a", "!! a"]).tolist() == [
        [512, 320, 513, 0, 0, 0, 0, 0],
        [512, 0, 256, 320, 513, 0, 0, 0],
    ]
    assert tokenizer([]).shape == (0, 8)


@pytest.mark.parametrize(
    "text, words",
    [
        ("A  Photo\tof\n DOGS ", "a photo of dogs"),
        ("Don't we'll I'm they've", "don 't we 'll i 'm they 've"),
        ("he'd it's you're", "he 'd it 's you 're"),
        ("in 1999", "in 1 9 9 9"),
        ("2 dogs, a cat...", "2 dogs , a cat ..."),
        ("snake_case #tag", "snake _ case # tag"),
        ("fish &amp;amp; chips &lt;3", "fish & chips < 3"),
        ("Größe 日本語 🙂!", "größe 日本語 🙂!"),
    ],
)  # fmt: skip
def test_words(text, words):
    assert captions.WORD.findall(captions.clean(text)) == words.split()


def test_tokens_give_back_the_text():
    symbols = {symbol: byte for byte, symbol in gpt2_symbols().items()}
    texts = texts_of_every_kind()
    tokenizer = Tokenizer(learn_merges(texts, 40), 77)
    names = {i: symbol for symbol, i in tokenizer.ids.items()}
    merged = 0
    for text in texts:
        start, *tokens, end = tokenizer.encode(text)
        assert (start, end) == (tokenizer.start, tokenizer.end)
        merged += sum(token >= 512 for token in tokens)
        whole = "".join(names[token] for token in tokens)
        words = []
        for word in whole.removesuffix("</w>").split("</w>"):
            words.append(bytes(symbols[symbol] for symbol in word).decode())
        assert words == captions.WORD.findall(text.lower())
    assert merged > 100


# --------------------------------------------------------------------------------------- merges
def join(symbols, pair):
    """Every occurrence of the pair becomes one symbol, from the left."""
    joined = []
    i = 0
    while i < len(symbols):
        width = 2 if tuple(symbols[i : i + 2]) == pair else 1
        joined.append("".join(symbols[i : i + width]))
        i += width
    return joined


def naive_merges(texts, count):
    """All words in a list, all pairs counted anew before each merge."""
    table = gpt2_symbols()
    words = []
    for text in texts:
        for word in captions.WORD.findall(captions.clean(text)):
            *first, last = [table[byte] for byte in word.encode()]
            words.append([*first, last + "</w>"])
    merges = []
    for _ in range(count):
        pairs = Counter()
        for word in words:
            pairs.update(zip(word, word[1:]))
        most = max(pairs.values(), default=0)
        if most < 2:
            break
        best = max(pair for pair in pairs if pairs[pair] == most)
        merges.append(best)
        words = [join(word, best) for word in words]
    return merges


@pytest.mark.parametrize(
    "texts, count",
    [
        (["aaaa aaaa aaa aa", "aaaaaaa"], 20),
        (["abab", "ab ab", "abba", "babab"], 20),
        (["banana bandana", "ban the banana"], 3),  # fewer than there are
        (["only once"], 20),
        ([], 20),
        (texts_of_every_kind(), 60),
        (captioned_patterns(80, 7)[3], 60),
    ],
)
def test_merges_are_those_of_the_naive_algorithm(texts, count):
    merges = learn_merges(texts, count)
    assert merges == naive_merges(texts, count)
    assert len(merges) <= count


def test_words_are_merged_in_the_order_learnt():
    """The earliest merge first, wherever it stands in the word, until there is none left."""
    texts = texts_of_every_kind()
    merges = learn_merges(texts, 40)
    tokenizer = Tokenizer(merges, 77)
    table = gpt2_symbols()
    for word in captions.WORD.findall(" ".join(texts)):
        *first, last = [table[byte] for byte in word.encode()]
        symbols = [*first, last + "</w>"]
        for pair in merges:
            symbols = join(symbols, pair)
        assert tokenizer.encode_word(word) == [tokenizer.ids[symbol] for symbol in symbols]


def test_learning_the_default_merges_takes_no_time():
    """A twentieth of a second; a second would be felt."""
    texts = captioned_patterns(2000, 1)[3] * 8
    count = clip.SETTINGS["vocabulary"][0]
    before = time.process_time()
    merges = learn_merges(texts, count)
    assert time.process_time() - before < 1.5
    assert 100 < len(merges) <= count


def test_merges_are_saved_and_read_again(tmp_path):
    texts = texts_of_every_kind()
    first = Tokenizer(learn_merges(texts, 40), 20)
    first.save(tmp_path / "merges.txt")
    second = Tokenizer(captions.read_merges(tmp_path / "merges.txt"), 20)
    assert first.merges == second.merges
    assert torch.equal(first(texts), second(texts))


@pytest.fixture(scope="module")
def official_merges():
    """A file of merges as OpenAI's: a title, and more lines than CLIP uses."""
    symbols = list(gpt2_symbols().values())
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2']
    for left in symbols[:200]:
        lines += [f"{left} {right}" for right in symbols]
    assert len(lines) == 51_201
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("compressed", [False, True])
def test_a_merges_file_of_openai(compressed, official_merges, tmp_path):
    path = tmp_path / "bpe"  # told by its content, not by its name
    content = official_merges.encode()
    path.write_bytes(gzip.compress(content, 1) if compressed else content)
    args = clip.parse_args(["--merges", str(path)])
    tokenizer = captions.build_tokenizer(args, ["not a word of these"] * 9)
    assert len(tokenizer.merges) == 48_894
    assert tokenizer.merges[0] == ("!", "!")
    assert (tokenizer.start, tokenizer.end) == (49_406, 49_407)
    assert tokenizer.vocabulary == 49_408


def damage(content, kind):
    compressed = gzip.compress(content)
    middle = len(compressed) // 2
    return {
        "cut": compressed[:middle],
        "changed": compressed[:-9] + b"?" + compressed[-8:],
        "overwritten": compressed[:middle] + 200 * b"\xff" + compressed[middle + 200 :],
        "not UTF-8": b"title\n\xff\xfe\xfd \x80\n",
        "three symbols": b"title\na b\na b c\n",
        "one symbol": b"title\nab\n",
        "a blank line": b"title\n\na b\n",
    }[kind]


@pytest.mark.parametrize(
    "kind",
    "cut,changed,overwritten,not UTF-8,three symbols,one symbol,a blank line".split(","),
)
def test_a_damaged_merges_file(kind, official_merges, tmp_path, capsys):
    path = tmp_path / "merges.txt"
    path.write_bytes(damage(official_merges[:20_000].encode(), kind))
    assert f"--merges {path}: " in error_line(capsys, captions.read_merges, path)


def test_a_merges_file_that_is_none(tmp_path, capsys):
    line = error_line(capsys, captions.read_merges, tmp_path / "nowhere")
    assert "No such file" in line
    assert f"--merges {tmp_path}: " in error_line(capsys, captions.read_merges, tmp_path)


# ----------------------------------------------------------------------------------- truncation
def test_a_caption_cut_short_keeps_its_end_token(capsys):
    tokenizer = Tokenizer([], 6)
    texts = ["a b", "a b c d", "a b c d e", "a b c d e f g h"]
    found = tokenizer(texts).tolist()
    whole = tokenizer.encode("a b c d")
    assert len(whole) == 6
    assert found[1] == found[2] == found[3] == whole
    assert found[0] == [*whole[:3], tokenizer.end, 0, 0]
    assert len(tokenizer.encode(texts[3])) == 10  # of itself, encode cuts nothing
    tokenizer.report_cut(texts)
    assert capsys.readouterr().out == "2 of 4 captions are cut to 6 tokens\n"
    tokenizer.report_cut(texts[:2])
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------- captions of patterns
@pytest.fixture(scope="module")
def drawn():
    """What captioned_patterns returns, and by how much each image was made smaller."""
    zooms = []
    resize = captions.resize_patterns

    def recorded(images, zoom):
        zooms.append(zoom.flatten())
        return resize(images, zoom)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions, "resize_patterns", recorded)
        found = captioned_patterns(600, seed=5)
    return *found, *zooms


def test_captioned_patterns_are_a_function_of_the_seed(drawn):
    images, labels, grounds, said = captioned_patterns(600, seed=5)
    assert torch.equal(images, drawn[0]) and torch.equal(grounds, drawn[2])
    assert said == drawn[3]
    assert not torch.equal(captioned_patterns(600, seed=6)[0], images)
    assert images.shape == (600, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(labels, torch.arange(600) % 10)


def test_images_without_a_ground_are_those_of_common(drawn):
    """The others are those too, but smaller or larger and inside a shape."""
    images, labels, grounds, _, zoom = drawn
    plain, expected = common.patterns(600, seed=5)
    assert torch.equal(labels, expected)
    pasted = grounds >= 0
    assert 200 < pasted.sum() < 400
    assert torch.equal(images[~pasted], plain[~pasted])
    resized = captions.resize_patterns(plain, zoom.view(-1, 1, 1, 1))[pasted]
    images = images[pasted]
    centre = (slice(None), slice(None), slice(13, 19), slice(13, 19))
    assert torch.equal(images[centre], resized[centre])  # every shape covers it
    for image, pattern, ground in zip(images, resized, grounds[pasted]):
        outside = (image != pattern).any(0)
        seen = image[:, outside].double().mean(1) / 255
        colour = torch.tensor(list(GROUNDS.values())[ground])
        assert outside.double().mean() < 0.8
        if outside.double().mean() > 0.05:
            assert (seen > 0.7 * colour - 0.2).all() and (seen < colour + 0.2).all()
    assert sorted(set(grounds.tolist())) == list(range(-1, len(GROUNDS)))


def mirrored(place):
    """A place among 32 pixels, reflected at the outer sides of the first and the last."""
    while not -0.5 <= place <= 31.5:
        place = -1 - place if place < -0.5 else 63 - place
    return min(max(place, 0), 31)


@pytest.mark.parametrize("zoom", [0.7, 1.0, 1.6])
def test_patterns_are_resized_as_by_hand(zoom):
    image = common.patterns(3, seed=5)[0][2]
    found = captions.resize_patterns(image[None], torch.full((1, 1, 1, 1), zoom))[0]
    for row, column in ((0, 0), (3, 17), (16, 16), (31, 2), (9, 31)):
        y, x = [mirrored((place - 15.5) * zoom + 15.5) for place in (row, column)]
        top, left = min(int(y), 30), min(int(x), 30)
        expected = 0.0
        for i, height in ((top, 1 - (y - top)), (top + 1, y - top)):
            for j, width in ((left, 1 - (x - left)), (left + 1, x - left)):
                expected = expected + height * width * image[:, i, j].double()
        assert (found[:, row, column] - expected).abs().max() <= 0.51
    if zoom == 1:
        assert torch.equal(found, image)


def test_all_or_none_are_pasted():
    assert (captioned_patterns(50, seed=1, pasted=1.0)[2] >= 0).all()
    assert (captioned_patterns(50, seed=1, pasted=0.0)[2] == -1).all()


def test_captions_name_the_family_and_say_nothing_wrong(drawn):
    """Read word by word; every statement is true of the image, and not all are made."""
    _, labels, grounds, texts, zoom = drawn
    _, _, facts = common.draw_patterns(600, seed=5)
    frequency = facts["frequency"] * torch.where(grounds >= 0, zoom, 1.0)
    last_words = {}
    for family, nouns in NOUNS.items():
        for noun in nouns:
            last_words[noun.split()[-1]] = family
    assert len(last_words) == 30
    said = Counter()
    for i, text in enumerate(texts):
        words = text.split()
        assert {last_words[word] for word in words if word in last_words} == {PATTERNS[labels[i]]}
        truths = {
            "fine": frequency[i] > 9,
            "coarse": frequency[i] < 7.5,
            "pale": facts["pale"][i],
            "dark": not facts["pale"][i],
            "left-leaning": facts["tilt"][i] < -0.2,
            "right-leaning": facts["tilt"][i] > 0.2,
        }
        truths |= {shape.split()[-1]: grounds[i] >= 0 for shape in SHAPES}
        for number, ground in enumerate(GROUNDS):
            truths[ground] = grounds[i] == number
        for word, truth in truths.items():
            if word in words:
                assert truth, text
                said[word] += 1
    assert len(said) == len(truths) and min(said.values()) > 5
    assert 0.4 < (said["pale"] + said["dark"]) / 600 < 0.6
    assert len(set(texts)) > 300


def test_the_words_suit_the_pixels():
    """pale: light dots, on a dark ground; fine: more edges; right-leaning: like a slash."""
    images, labels, drawn = common.draw_patterns(1000, seed=5)
    x = images.double().mean(1)
    dots = labels == PATTERNS.index("dots")
    pale = drawn["pale"]
    assert x[dots & pale].mean() < 0.8 * x[dots & ~pale].mean()
    across = x[:, 1:-1, 2:] - x[:, 1:-1, :-2]
    down = x[:, 2:, 1:-1] - x[:, :-2, 1:-1]
    stripes = labels == PATTERNS.index("stripes")
    edges = across.abs().mean((1, 2))
    frequency = drawn["frequency"]
    assert edges[stripes & (frequency > 9)].mean() > edges[stripes & (frequency < 7.5)].mean()
    lean = (across * down).mean((1, 2))
    assert (lean[stripes & (drawn["tilt"] > 0.2)] > 0).all()
    assert (lean[stripes & (drawn["tilt"] < -0.2)] < 0).all()


def shrink(monkeypatch, n=400, labelled=60):
    """Fewer captioned patterns and fewer of common's; returns a list of (seed, images, families,
    grounds) of what is drawn."""
    drawn = []
    original = captions.captioned_patterns

    def fewer(_, seed, **settings):
        found = original(n, seed, **settings)
        drawn.append((seed, *found[:3]))
        return found

    images, labels = common.patterns(3 * labelled)
    train = (images[labelled:], labels[labelled:])
    test = (images[:labelled], labels[:labelled])
    data = common.Data("patterns", train[0], train, test, PATTERNS)
    monkeypatch.setattr(captions, "captioned_patterns", fewer)
    monkeypatch.setattr(captions.common, "load_images", lambda *_: data)
    return drawn


def test_a_third_of_the_pairs_is_held_out_of_training(monkeypatch):
    drawn = shrink(monkeypatch)
    data = captions.load_captions("patterns", "data")
    families = torch.arange(10).repeat_interleave(6)
    grounds = torch.arange(6).repeat(10)
    out = captions.is_held_out(families, grounds)
    assert out.sum() == 20
    assert out.view(10, 6).sum(1).tolist() == [2] * 10
    assert out.view(10, 6).sum(0).min() >= 3  # every ground is seen with most of the families
    pairs = {(f, g) for f, g in zip(families[out].tolist(), grounds[out].tolist())}

    kept = []
    seen = set()
    for _, images, labels, where in drawn[:4]:
        for image, pair in zip(images, zip(labels.tolist(), where.tolist())):
            if pair not in pairs:
                kept.append(image)
                seen.add(pair)
    assert len(seen) == 40 + 10  # all other pairs, and the families on no ground
    assert torch.equal(data.pretrain, torch.stack(kept))
    assert len(data.captions) == len(kept)
    for text in data.captions:
        words = text.split()
        for family, ground in pairs:
            if list(GROUNDS)[ground] in words:
                assert not any(noun.split()[-1] in words for noun in NOUNS[PATTERNS[family]]), text

    images, labels, where, held_out = data.pasted
    assert (where >= 0).all()
    assert torch.equal(held_out, captions.is_held_out(labels, where))
    assert 0.2 < held_out.double().mean() < 0.5


def test_images_of_the_test_are_drawn_from_other_seeds(monkeypatch):
    drawn = shrink(monkeypatch)
    data = captions.load_captions("patterns", "data")
    seeds = [seed for seed, *_ in drawn]
    assert len(set(seeds)) == len(seeds) == 6
    assert 0 not in seeds  # the seed of common's own, on which zero-shot is measured
    images, said = data.pairs
    assert len(images) == len(said) == len(set(said)) < 400  # no caption twice
    assert torch.equal(images[0], drawn[4][1][0])
    assert len(data.test[0]) == 60 and data.classes == PATTERNS
    assert data.templates == captions.FRAMES


# -------------------------------------------------------------------------- folders with captions
def write_captioned(folder, n=40, seed=3, table=False):
    """A folder of n images of 32 x 32 with captions: a .txt beside each, or captions.tsv."""
    images, labels, _, texts = captioned_patterns(n, seed)
    write_folder(folder, images, labels)
    lines = []
    for number, (label, text) in enumerate(zip(labels, texts)):
        path = folder / PATTERNS[label] / f"{number:03}.png"
        lines.append(f"{path.relative_to(folder)}\t{text}\n")
        if not table:
            path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    if table:
        (folder / "captions.tsv").write_text("".join(lines), encoding="utf-8")
    return images, texts


@pytest.mark.parametrize("table", [False, True])
def test_a_folder_with_captions(table, tmp_path, capsys):
    images, texts = write_captioned(tmp_path / "mine", table=table)
    data = captions.load_captions(str(tmp_path / "mine"), "data")
    assert capsys.readouterr().out == ""
    assert data.name == "mine"
    assert not data.test and not data.pasted and data.templates == captions.TEMPLATES
    assert data.pretrain.shape == (36, 3, 32, 32) and len(data.captions) == 36
    assert len(data.pairs[0]) == len(data.pairs[1]) <= 4
    found = zip([*data.pretrain, *data.pairs[0]], [*data.captions, *data.pairs[1]])
    for image, text in found:  # each image has its own caption still
        number = [torch.equal(image, other) for other in images].index(True)
        assert text.strip() == texts[number]
    for image in data.pairs[0]:
        assert not any(torch.equal(image, other) for other in data.pretrain)


def test_held_out_pairs_have_different_captions(tmp_path):
    write_captioned(tmp_path)
    for number, path in enumerate(sorted(tmp_path.rglob("*.txt"))):
        path.write_text(("A dog", "a  dog\n", "a cat &amp; a dog")[number % 3])
    data = captions.load_captions(str(tmp_path), "data")
    found = [captions.clean(text) for text in data.pairs[1]]
    assert len(found) == len(set(found)) == len(data.pairs[0]) <= 2


def test_images_left_out_are_counted(tmp_path, capsys):
    """Without a caption, with an empty one, with one that cannot be decoded."""
    write_captioned(tmp_path)
    paths = sorted(tmp_path.rglob("*.txt"))
    paths[0].unlink()
    paths[1].unlink()
    paths[2].write_text(" \n&nbsp;\t")
    paths[3].write_bytes(b"caf\xe9")
    data = captions.load_captions(str(tmp_path), "data")
    assert len(data.pretrain) == 33
    assert len(data.captions) == 33
    assert capsys.readouterr().out == (
        "of 40 images, left out: 2 with no caption, 1 with an empty caption, "
        "1 with a caption that is not UTF-8\n"
    )


def test_empty_captions_of_a_table_are_counted(tmp_path, capsys):
    write_captioned(tmp_path, table=True)
    path = tmp_path / "captions.tsv"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(first.partition("\t")[0] + "\t \n" + rest)
    assert len(captions.load_captions(str(tmp_path), "data").captions) == 36  # of 39, 3 held out
    assert capsys.readouterr().out == "of 40 images, left out: 1 with an empty caption\n"


@pytest.mark.parametrize(
    "line, part",
    [
        ("dots/x.png a dog", "captions.tsv, line 41: no tab between path and caption"),
        ("nowhere.png\ta dog", "captions.tsv, line 41: there is no image nowhere.png"),
        ("dots\ta folder", "captions.tsv, line 41: there is no image dots"),
        (b"\xff\xfe", "captions.tsv: 'utf-8' codec can't decode"),
    ],
)
def test_a_wrong_line_of_a_table_is_named(line, part, tmp_path, capsys):
    write_captioned(tmp_path, table=True)
    with open(tmp_path / "captions.tsv", "ab") as file:
        file.write(line if isinstance(line, bytes) else line.encode())
    assert part in error_line(capsys, captions.load_captions, str(tmp_path), "data")


def test_tables_as_other_programs_write_them(tmp_path):
    """A mark of the byte order, lines ended as on Windows, separators of Unicode in a caption."""
    write_captioned(tmp_path, table=True)
    path = tmp_path / "captions.tsv"
    lines = path.read_text().splitlines()
    lines[5] = lines[5].partition("\t")[0] + "\ta dog\u2028and\x85a\x0bcat\tbeside\x1cit"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    data = captions.load_captions(str(tmp_path), "data")
    found = [captions.clean(text) for text in (*data.captions, *data.pairs[1])]
    assert len(found) >= 36
    assert "a dog and a cat beside it" in found


def test_a_mark_of_the_byte_order_is_no_word(tmp_path):
    write_captioned(tmp_path)
    for path in tmp_path.rglob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = captions.load_captions(str(tmp_path), "data").captions
    assert "\ufeff" not in "".join(found)


def test_folders_that_cannot_be_used(folder, tmp_path, capsys):
    def load(name):
        return error_line(capsys, captions.load_captions, str(name), "data")

    assert "nowhere: neither patterns nor a folder" in load(tmp_path / "nowhere")
    assert "cifar10: neither patterns nor a folder" in load("cifar10")
    assert ": 0 image(s) with a caption; it takes 20" in load(folder)
    assert ": 0 image(s) with a caption; it takes 20" in load(tmp_path)
    write_captioned(tmp_path / "few", n=19)
    assert ": 19 image(s) with a caption; it takes 20" in load(tmp_path / "few")
    write_captioned(tmp_path / "enough", n=20)
    assert len(captions.load_captions(str(tmp_path / "enough"), "data").captions) == 18
    (tmp_path / "few" / "captions.tsv").mkdir()
    assert "cannot read " in load(tmp_path / "few")


def test_images_of_several_sizes_stay_files(tmp_path):
    images, _ = write_captioned(tmp_path)
    path = sorted(tmp_path.rglob("*.png"))[4]
    Image.new("RGB", (40, 32)).save(path)
    data = captions.load_captions(str(tmp_path), "data")
    assert isinstance(data.pretrain, list) and isinstance(data.pairs[0], list)
    assert len(data.pretrain) == 36
    for image, text in zip(data.pretrain, data.captions):
        assert Path(image).with_suffix(".txt").read_text() == text + "\n"


@pytest.mark.parametrize("place", [0, 17])
def test_a_broken_small_image_is_named(place, tmp_path, capsys):
    write_captioned(tmp_path)
    path = sorted(tmp_path.rglob("*.png"))[place]
    path.write_bytes(path.read_bytes()[:200])
    line = error_line(capsys, captions.load_captions, str(tmp_path), "data")
    assert f"cannot read the image {path}" in line


@pytest.fixture
def captioned_photos(photos, tmp_path):
    """Twenty JPEG files of several sizes, with a caption each."""
    shutil.copytree(photos, tmp_path / "photos")
    for number, path in enumerate(sorted((tmp_path / "photos").iterdir())):
        path.with_suffix(".txt").write_text(f"picture {number} of {'so ' * 30} many")
    return tmp_path / "photos"


def test_large_images_are_read_from_their_files(captioned_photos):
    data = captions.load_captions(str(captioned_photos), "data")
    assert len(data.pretrain) == 18 and len(data.pairs[0]) == 2
    assert all(path.endswith(".jpg") for path in data.pretrain)


def test_a_run_on_large_images(captioned_photos, tmp_path, capsys):
    """Decoded in each step; one that is broken stops the run with its name."""
    flags = {"size": 64, "batch_size": 6, "epochs": 1, "text_layers": 1, "text_width": 16}
    args = small_args(clip, data=captioned_photos, out=tmp_path / "run", **flags)
    clip.main(args)
    assert "18 of 18 captions are cut to 24 tokens\n" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.png").stat().st_size > 10_000
    path = captioned_photos / "07.jpg"
    path.write_bytes(path.read_bytes()[:1500])
    args.out = str(tmp_path / "another")
    line = error_line(capsys, clip.main, args)
    assert f"cannot read the image {path}" in line and "truncated" in line


def test_paths_of_pictures(captioned_photos, capsys):
    paths = captions.image_paths(str(captioned_photos))
    assert len(paths) == 20 and paths == sorted(paths)
    assert captions.image_paths(paths[3]) == [paths[3]]
    for nothing in (captioned_photos / "x.jpg", captioned_photos / "x"):
        line = error_line(capsys, captions.image_paths, str(nothing))
        assert f"--images {nothing}: neither a picture nor a folder of pictures" in line


def test_a_long_run_holds_out_a_thousand_pairs_at_most(tmp_path, monkeypatch):
    texts = [f"caption {i}" for i in range(12_000)]
    monkeypatch.setattr(captions, "read_text_files", lambda _: (texts, texts))
    monkeypatch.setattr(captions, "read_images", lambda paths, _: paths)
    data = captions.load_captions(str(tmp_path), "data")
    assert len(data.pairs[1]) == 1000
    assert len(data.captions) == 11_000
    assert data.pretrain == data.captions
    assert len(set(data.captions) | set(data.pairs[1])) == 12_000
