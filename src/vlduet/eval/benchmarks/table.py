"""Every published benchmark by name. To add one: a loader in this folder, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlduet.errors import ConfigError, suggest_name
from vlduet.eval.benchmarks import (
    builtin,
    choice,
    compositional,
    demon,
    judged,
    knowledge,
    maps,
    retrieval,
    solved,
    vqa,
    yes_no,
)
from vlduet.eval.benchmarks.tasks import Benchmark

SUGAR, VLADVA, LLAVA, FROMAGE = "Sugar", "VladVA", "LLaVA-1.5", "FROMAGe"
BOTH = (SUGAR, VLADVA)
SPOKEN = (SUGAR, LLAVA)

KARPATHY, VAL2014, VAL2017 = "coco/dataset_coco.json", "coco/val2014/", "coco/val2017/"
COCO_IMAGES = ("coco/{filepath}", "coco/val2014")
VIST = (retrieval.STORY, "vist/images/val/")
IMAGENET = ("imagenet/val/WNID/", "imagenet/imagenet_class_index.json (or classnames.txt)")
WINOGROUND = ("winoground/examples.jsonl + images/ (or *.parquet)",)
MMVP = ("mmvp_vlm/Questions.csv", "mmvp_vlm/MMVP_VLM_Images/")
SCIENCEQA = ("scienceqa/problems.json", "scienceqa/pid_splits.json", "scienceqa/images/test/")
TEXTVQA = ("textvqa/TextVQA_0.5.1_val.json", "textvqa/train_images/")
OCR = "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json"
SEED = (
    "seedbench/SEED-Bench.json",
    "seedbench/SEED-Bench-image/",
    "seedbench/SEED-Bench-video-image/",
)
WEBQA = (knowledge.WEBQA, "webqa/imgs.tsv + imgs.lineidx (or webqa/images/)")
FVQA = tuple(
    f"{knowledge.FVQA}/{name}"
    for name in ("all_qs_dict_release.json", "all_fact_triples_release.json", "images/")
)
LLAVA_BENCH = tuple(
    f"llava_bench/{name}"
    for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "rule.json", "images/")
)
R = "R@1, R@5, R@10"


DISCRIMINATIVE = (
    Benchmark(
        "coco", "COCO 5k, the first five captions", BOTH, split="Karpathy test", metric=R,
        files=(KARPATHY, VAL2014), protocol="retrieval", load=retrieval.karpathy(KARPATHY, COCO_IMAGES, captions=5),
    ),
    Benchmark(
        "coco_all", "COCO 5k, all 25,010 captions", (), split="Karpathy test", metric=R,
        files=(KARPATHY, VAL2014), protocol="retrieval", load=retrieval.karpathy(KARPATHY, COCO_IMAGES, captions=None),
    ),
    Benchmark(
        "coco_unique", "COCO 5k, 24,809 distinct captions (UniIR)", (SUGAR,), split="Karpathy test", metric=R,
        files=(KARPATHY, VAL2014), protocol="retrieval",
        load=retrieval.karpathy(KARPATHY, COCO_IMAGES, captions=None, unique=True),
    ),
    Benchmark(
        "flickr30k", "Flickr30k 1k", (VLADVA,), split="Karpathy test", metric=R,
        files=("flickr30k/dataset_flickr30k.json", "flickr30k/flickr30k-images/"), protocol="retrieval",
        load=retrieval.karpathy("flickr30k/dataset_flickr30k.json", ("flickr30k/flickr30k-images",), captions=5),
    ),
    *(
        Benchmark(
            name, f"nocaps, {told}", (VLADVA,) if count is None else (), split="val", metric=R,
            files=("nocaps/nocaps_val_4500_captions.json", "nocaps/images/"), protocol="retrieval",
            load=retrieval.nocaps(count),
        )
        for name, count, told in (
            ("nocaps", None, "all ten captions"),
            ("nocaps_first5", 5, "the first five captions"),
            ("nocaps_first1", 1, "the first caption"),
        )
    ),
    *(
        Benchmark(
            name, f"VIST stories, {told}", (SUGAR, FROMAGE), split="val", metric=R, files=VIST, protocol="retrieval",
            load=retrieval.vist(captions=captions, context=context, unseen=unseen),
        )
        for name, captions, context, unseen, told in (
            ("vist_1c", 1, False, False, "one caption"),
            ("vist_5c", 5, False, False, "five captions"),
            ("vist_5c_unseen", 5, False, True, "five captions, without the four images seen"),
            ("vist_5c4i", 5, True, False, "five captions and four images"),
            ("vist_5c4i_unseen", 5, True, True, "five captions and four images, without those seen"),
        )
    ),
    Benchmark(
        "winoground", "Winoground", BOTH, split="test, 400", metric="text, image, group",
        files=WINOGROUND, protocol="pairs", load=compositional.winoground,
    ),
    Benchmark(
        "sugarcrepe", "SugarCrepe, seven subsets", (VLADVA,), split="all, 7,511", metric="accuracy",
        files=("sugarcrepe/{SUBSET}.json x 7", VAL2017), protocol="pairs", load=compositional.sugarcrepe,
    ),
    Benchmark(
        "sugarcrepe_pp", "SugarCrepe++, five subsets", (VLADVA,), split="all, 4,757", metric="ITT, TOT",
        files=("sugarcrepe_pp/{SUBSET}.json x 5", VAL2017), protocol="pairs", load=compositional.sugarcrepe_plus,
    ),
    Benchmark(
        "mmvp_vlm", "MMVP-VLM, pairs", (SUGAR,), split="all, 9 x 15 pairs", metric="pair accuracy",
        files=MMVP, protocol="pairs", load=compositional.mmvp_vlm,
    ),
    Benchmark(
        "mmvp_vlm_qa", "MMVP-VLM as questions (not comparable with pairs)", (SUGAR,), split="all, 9 x 15 pairs",
        metric="question accuracy", files=MMVP, protocol="answer", load=compositional.mmvp_questions,
    ),
    Benchmark(
        "imagenet", "ImageNet-1k zero-shot, 'a photo of a {}'", (VLADVA,), split="val, 50,000", metric="R@1, R@5",
        files=IMAGENET, protocol="retrieval", load=retrieval.imagenet(retrieval.PLAIN),
    ),
    Benchmark(
        "imagenet_80", "ImageNet-1k zero-shot, CLIP's 80 templates", (VLADVA,), split="val, 50,000", metric="R@1, R@5",
        files=IMAGENET, protocol="retrieval", load=retrieval.imagenet(retrieval.CLIP_80),
    ),
)  # fmt: skip

GENERATIVE = (
    Benchmark(
        "vqav2_val", "VQAv2", (), split="val, 214,354", metric="VQA accuracy",
        files=(f"vqav2/{vqa.VQAV2['val'][0]}", vqa.VQAV2_ANSWERS, VAL2014), protocol="answer", load=vqa.vqav2("val"),
    ),
    *(
        Benchmark(
            f"vqav2_{split}", "VQAv2", SPOKEN if split == "testdev" else (), split=told, metric="export for the server",
            files=(f"vqav2/{vqa.VQAV2[split][0]}", "coco/test2015/"), protocol="answer", load=vqa.vqav2(split),
        )
        for split, told in (("testdev", "test-dev, 107,394"), ("test", "test, 447,793"))
    ),
    Benchmark(
        "gqa", "GQA", SPOKEN, split="testdev_balanced, 12,578", metric="exact match",
        files=("gqa/testdev_balanced_questions.json", "gqa/images/"), protocol="answer", load=vqa.gqa,
    ),
    Benchmark(
        "vizwiz_val", "VizWiz", (), split="val, 4,319", metric="VQA accuracy",
        files=("vizwiz/Annotations/val.json", "vizwiz/val/"), protocol="answer", load=vqa.vizwiz("val"),
    ),
    Benchmark(
        "vizwiz_test", "VizWiz", SPOKEN, split="test, 8,000", metric="export for the server",
        files=("vizwiz/Annotations/test.json", "vizwiz/test/"), protocol="answer", load=vqa.vizwiz("test"),
    ),
    Benchmark(
        "scienceqa_img", "ScienceQA, questions with an image", SPOKEN, split="test, 2,017", metric="accuracy",
        files=SCIENCEQA, protocol="answer", load=choice.scienceqa,
    ),
    Benchmark(
        "textvqa", "TextVQA with OCR tokens", SPOKEN, split="val, 5,000", metric="VQA accuracy",
        files=(TEXTVQA[0], OCR, TEXTVQA[1]), protocol="answer", load=vqa.textvqa(ocr=True),
    ),
    Benchmark(
        "textvqa_plain", "TextVQA without OCR tokens", (), split="val, 5,000", metric="VQA accuracy",
        files=TEXTVQA, protocol="answer", load=vqa.textvqa(ocr=False),
    ),
    Benchmark(
        "pope", "POPE: random, popular, adversarial", SPOKEN, split="COCO val2014", metric="mean F1",
        files=("pope/coco_pope_{random,popular,adversarial}.json", VAL2014), protocol="answer", load=yes_no.pope,
    ),
    Benchmark(
        "mme", "MME, perception and cognition", SPOKEN, split="all, 2,374", metric="sum of acc and acc+",
        files=(f"{yes_no.ROOT}/TASK/",), protocol="answer", load=yes_no.mme,
    ),
    Benchmark(
        "mmbench_dev", "MMBench, circular", SPOKEN, split="dev, 1,176 x 2-4", metric="CircularEval accuracy",
        files=("mmbench/mmbench_dev_20230712.tsv (or MMBench_DEV_EN.tsv)",), protocol="answer",
        load=choice.mmbench("mmbench/mmbench_dev_20230712.tsv", "mmbench/MMBench_DEV_EN.tsv"),
    ),
    Benchmark(
        "mmbench_test", "MMBench, circular", (), split="test", metric="export for the server",
        files=("mmbench/mmbench_test_20230712.tsv (or MMBench_TEST_EN.tsv)",), protocol="answer",
        load=choice.mmbench("mmbench/mmbench_test_20230712.tsv", "mmbench/MMBench_TEST_EN.tsv"),
    ),
    Benchmark(
        "seedbench", "SEED-Bench, by letter", (LLAVA,), split="v1, image and video", metric="accuracy",
        files=SEED, protocol="answer", load=choice.seedbench,
    ),
    Benchmark(
        "seedbench_likelihood", "SEED-Bench, by likelihood", (), split="v1, image and video", metric="accuracy",
        files=SEED, protocol="choose", load=choice.seedbench_likelihood,
    ),
    Benchmark(
        "llava_bench", "LLaVA-Bench-in-the-Wild", SPOKEN, split="all, 60", metric="judge: ratio to GPT-4",
        files=LLAVA_BENCH, protocol="judge", load=judged.llava_bench,
    ),
    Benchmark(
        "mmvet", "MM-Vet", SPOKEN, split="all, 218", metric="judge: mean grade",
        files=("mmvet/mm-vet.json", "mmvet/images/"), protocol="judge", load=judged.mmvet,
    ),
    Benchmark(
        "demon", "DEMON, 29 tasks in 7 categories", (SUGAR,), split="core, 18,176", metric="ROUGE-L, accuracy",
        files=("demon/TASK/core/core.json x 29", "demon/TASK/core/images/"), protocol="answer", load=demon.demon(),
    ),
    Benchmark(
        "demon_repaired", "DEMON with VisualCloze matched as an image choice", (), split="core, 18,176",
        metric="ROUGE-L, accuracy", files=("demon/TASK/core/core.json x 29", "demon/TASK/core/images/"),
        protocol="answer", load=demon.demon(repaired=True),
    ),
    *(
        Benchmark(
            f"demon/{name}", f"DEMON, {category}", (SUGAR,), split="core",
            metric="ROUGE-L" if category in demon.OPEN else "accuracy",
            files=(f"demon/{name}/core/core.json", f"demon/{name}/core/images/"), protocol="answer", load=demon.demon(name),
        )
        for category, members in demon.TASKS.items()
        for name in members
    ),
)  # fmt: skip

KNOWLEDGE = (
    Benchmark(
        "webqa", "WebQA: retrieval and answers", (SUGAR,), split="val, 1,000 drawn",
        metric="ROUGE-L, Acc, R@k, F1; FL and QA with a BART", files=WEBQA, protocol="rag", load=knowledge.webqa,
    ),
    Benchmark(
        "webqa_position", "WebQA yes/no by the place of the relevant image", (SUGAR,), split="val, 500 drawn x 6",
        metric="accuracy by place", files=WEBQA, protocol="answer", load=knowledge.webqa_position,
    ),
    Benchmark(
        "fvqa", "FVQA: retrieval and answers", (SUGAR,), split="all with ans_source KB", metric="ROUGE-L, R@k",
        files=FVQA, protocol="rag", load=knowledge.fvqa,
    ),
    Benchmark(
        "vizwiz_rag", "VizWiz with retrieved training questions", (SUGAR,), split="val, 4,319", metric="VQA accuracy",
        files=("vizwiz/Annotations/{val,train}.json", "vizwiz/{val,train}/"), protocol="rag", load=knowledge.vizwiz_rag,
    ),
    Benchmark(
        "scienceqa_rag", "ScienceQA-IMG with retrieved training questions", (SUGAR,), split="test, 2,017",
        metric="accuracy", files=(*SCIENCEQA, "scienceqa/images/train/"), protocol="rag", load=knowledge.scienceqa_rag,
    ),
)  # fmt: skip


def _ours(
    name: str,
    title: str,
    *,
    corpora: tuple[str, ...],
    protocol: str,
    metric: str,
    load: Callable[[Any], Any],
) -> Benchmark:
    files = tuple(f"corpora/{corpus}/test.jsonl" for corpus in corpora)
    return Benchmark(f"builtin_{name}", title, (), "our test split", metric, files, protocol, load)


TOLD_APART = "text, image, group"
BUILTIN = (
    _ours(
        "stamps", "Stamps and their captions", corpora=("stamps",), protocol="retrieval", metric=R,
        load=builtin.retrieval("stamps"),
    ),
    _ours(
        "emoji", "Emoji of two vendors and their names", corpora=("emoji",), protocol="retrieval", metric=R,
        load=builtin.retrieval("emoji"),
    ),
    _ours(
        "long", "Units, ships and planets and what is told of them", corpora=("wesnoth", "endless-sky"),
        protocol="retrieval", metric=R, load=builtin.retrieval("wesnoth", "endless-sky", long=True),
    ),
    _ours(
        "next_image", "The next image of stories and manual pages", corpora=("campaigns", "gimp-help"),
        protocol="retrieval", metric=R, load=builtin.next_image("campaigns", "gimp-help"),
    ),
    _ours(
        "pairs_emoji", "Emoji of a subgroup whose names differ in a word", corpora=("emoji",), protocol="pairs",
        metric=TOLD_APART, load=builtin.minimal_pairs("emoji", "subgroup"),
    ),
    _ours(
        "pairs_stamps", "Stamps whose captions differ in a word", corpora=("stamps",), protocol="pairs",
        metric=TOLD_APART, load=builtin.minimal_pairs("stamps", ""),
    ),
    _ours(
        "vqa", "Questions by template on units and kinds of things", corpora=("wesnoth", "emoji", "stamps"),
        protocol="choose", metric="accuracy", load=builtin.template_questions,
    ),
    _ours(
        "maps", "Questions by template on maps, regions and flags", corpora=("maps",), protocol="choose",
        metric="accuracy", load=maps.questions,
    ),
    _ours(
        "maps_rag", "Capitals of what a picture shows, with retrieval", corpora=("maps",), protocol="rag",
        metric="word F1, R@k", load=maps.knowledge,
    ),
    _ours(
        "captions", "Captions of stamps", corpora=("stamps",), protocol="answer", metric="word F1",
        load=builtin.captions("stamps"),
    ),
    _ours(
        "caption_choice", "The own caption of a stamp among four", corpora=("stamps",), protocol="choose",
        metric="accuracy", load=builtin.caption_choice("stamps"),
    ),
    _ours(
        "position", "Which of six captioned stamps is shown again, by its place", corpora=("stamps",), protocol="choose",
        metric="accuracy by place", load=builtin.position_probe,
    ),
    Benchmark(
        "builtin_rag_examples", "Kinds of stamps, with solved training questions to find", (), "our test split",
        "accuracy, R@k", ("corpora/stamps/{test,train}.jsonl",), "rag", solved.with_examples,
    ),
    _ours(
        "rag_documents", "Kinds of named things, with a sentence about each to find", corpora=("stamps",),
        protocol="rag", metric="accuracy, R@k", load=solved.with_documents,
    ),
)  # fmt: skip

SUITES = {
    "builtin": BUILTIN,
    "discriminative": DISCRIMINATIVE,
    "generative": GENERATIVE,
    "knowledge": KNOWLEDGE,
}
BENCHMARKS = {row.name: row for suite in SUITES.values() for row in suite}


def known(name: str) -> Benchmark:
    """A benchmark by name. Raises ConfigError naming the closest one."""
    if name not in BENCHMARKS:
        raise ConfigError(
            f"no benchmark '{name}'", place="eval", fix=suggest_name(name, BENCHMARKS)
        )
    return BENCHMARKS[name]
