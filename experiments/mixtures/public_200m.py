"""What would 200 million heterogeneous samples from public sources be, and what do they cost?

    python -m experiments.mixtures.public_200m [--scale=1|10|1000] [--row-tokens=4096] [--batch-rows=256] [--commands]

Ours: the paper (arXiv 2512.23512) names more than 200M samples and no source. This recipe replaces its mixture, it does
not reproduce it: 14 named public sets, `count` samples of each, drawn `epochs` times in a pass of exactly 200M draws.
In an experiment: `config.data.sources = ConfigDict(public_200m.sources())`, or `sources("1000")` for the twin of a
thousandth with the same weights and roles.

What is known and from where: `url`, `revision`, `licence` and `published` are the publisher's, read from a stored copy
of the page in `url`. What could not be confirmed stands in `unverified`; an empty `revision` must be pinned before use.
`count` is what we expect to keep, so it is below `published` where images are fetched by URL and many no longer answer.
Tokens, images and bytes per sample are estimates unless a comment gives their source. The real figures are in the
manifests and in `data-stats` once the folders are prepared.

The commands as printed run on one machine, which holds a set in memory (or, for a JSON list, the list). For the large
sets add a cluster's `--runner=... -- ...` (data_pipelines/README.md); name fewer raw files for a twin. `data/tokenizer`
is a folder with a tokenizer.json of your choice.

Some sets share pictures: Recap-DataComp and COYO are both from Common Crawl, FineVision and LLaVA-Instruct both hold
TextVQA and OCR-VQA, and MAmmoTH-VL is made of 153 public sets. `epochs` counts repeats within a source only.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

from unihetero_jax.text_table import align

PASS_SAMPLES = 200_000_000
"""Draws of one pass; weights are shares of it."""
SCALES = ("1", "10", "1000")
"""The mixture and its twins of a tenth and a thousandth."""
LAYOUTS = (
    "webdataset", "web_metadata", "coco", "cc_tsv", "interleaved", "llava", "parquet", "jsonl", "text", "tfds",
    "image_only",
)  # fmt: skip
"""What `data_pipelines.convert` reads."""
RAW, PREPARED, TOKENIZER = "raw", "data/public-200m", "data/tokenizer"
"""Folders of the raw sets, of the prepared ones, and of the tokenizer."""
IMAGE_SPEC = "--patch-size=16 --min-patches=64 --max-patches=1024"
"""Images of 128 x 128 to 512 x 512 pixels: 16 to 256 visual tokens."""
IMAGE_TOKENS = 256
"""Visual tokens of an image, at most and in this estimate; `IMAGE_SPEC` fixes it."""
DOCUMENT_BOUNDS = "--max-images=8 --max-chars=8000"
"""Of a record of an interleaved document, so that it fits a row of 4,096; a longer document becomes several."""
SHARD_BYTES = 2 * 10**9
"""Aimed at by the number of files that a prepared source is split into (our choice)."""
ROW_FILL = 0.99
"""Share of a row that packing fills. Our guess: planned on token counts alone it is .998, patches bind as well."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One public set and what is made of it.

    Attributes:
        name: key in `data.sources` and name of the prepared folder.
        title: as its authors call it.
        part: share of the mixture that it belongs to.
        url: page of the set; where the facts were read.
        revision: commit of the page's repository, or the version; empty: not found, to be pinned before use.
        licence: of annotations; pictures fetched by URL are under their own.
        layout: subcommand of `data_pipelines.convert`.
        published: samples that the publisher counts.
        count: samples that we use of it.
        epochs: how often each is drawn in a pass.
        text_tokens, images: means per sample.
        bytes_per_sample: of a prepared record.
        order, text_first_share, text_loss, visual_loss: as in `data.sources`.
        stored_after_text: share of images that come after text in the stored order; also taken for the share of
            samples with such an image.
        fetch: shell command that brings the raw set.
        inputs: what `--input` of the preparation is given.
        flags: further flags of the preparation.
        unverified: what of all this could not be confirmed.
    """

    name: str
    title: str
    part: Literal["captions", "ocr", "interleaved", "vqa", "image_only", "text"]
    url: str
    revision: str
    licence: str
    layout: str
    published: int
    count: int
    text_tokens: float
    bytes_per_sample: int
    fetch: str
    inputs: str
    flags: str = ""
    epochs: float = 1
    images: float = 1
    order: Literal["stored", "image_first", "text_first", "coin"] = "stored"
    text_first_share: float = 0.5
    stored_after_text: float = 0.0
    text_loss: Literal["stored", "none"] = "stored"
    visual_loss: Literal["generated", "all", "none"] = "none"
    unverified: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether everything but the estimates was confirmed."""
        return not self.unverified

    @property
    def weight(self) -> float:
        """Share of the draws of a pass."""
        return self.count * self.epochs / PASS_SAMPLES

    @property
    def generated_share(self) -> float:
        """Expected share of its images that carry the visual loss."""
        if not self.images or self.visual_loss == "none":
            return 0.0
        if self.visual_loss == "all":
            return 1.0
        after_text = {"stored": self.stored_after_text, "image_first": 0.0, "text_first": 1.0}
        return self.text_first_share if self.order == "coin" else after_text[self.order]


def _hub_download(repository: str, revision: str, folder: str, *patterns: str) -> str:
    pinned = f" --revision={revision}" if revision else ""
    included = "".join(f" --include='{pattern}'" for pattern in patterns)
    return f"hf download {repository} --repo-type=dataset{pinned}{included} --local-dir={RAW}/{folder}"


def _download_images(urls: str, folder: str, columns: str, output_format: str = "webdataset") -> str:
    """The images behind URLs, at most 512 pixels long."""
    return (
        f"img2dataset --url_list={urls} {columns} --output_format={output_format} --output_folder={RAW}/{folder} "
        "--image_size=512 --resize_mode=keep_ratio_largest --resize_only_if_bigger=True --encode_quality=90 "
        "--processes_count=16 --thread_count=128"
    )


def _image_map(folder: str) -> str:
    """Lists the file of each URL that was fetched, as `read_image_map` takes it."""
    return f"""python -c "
import glob, pyarrow.parquet as pq
with open('{RAW}/{folder}/images.tsv', 'w') as file:
    for path in sorted(glob.glob('{RAW}/{folder}/images/*.parquet')):
        for row in pq.read_table(path, columns=['url', 'key', 'status']).to_pylist():
            if row['status'] == 'success' and len(row['url'].split()) == 1:
                print(row['url'], row['key'][:5] + '/' + row['key'] + '.jpg', sep=chr(9), file=file)
\""""


def _steps(*commands: str) -> str:
    return " && \\\n".join(commands)


_RECAP_REVISION = "278402454843b7b57e8c376d27705039013a4c0a"
_CC12M_REVISION = "796118f2eabdb9984f23f7f15d1e74d388612fc6"
_TEXTATLAS_REVISION = "84452085f23852004dd2a1928eb5a5c106808df8"
_DOCMATIX_REVISION = "5018293dd07496d542408ae5a414afeac248d9c4"
_OBELICS_REVISION = "adf875ca0dd4f8950a3669bf816f7165a83f9791"
_LLAVA_REVISION = "9d451dc7629cfe0469f6ae4432b765cd603d5fcb"
_MAMMOTH_REVISION = "faccd1e4b33eab8b8cc62edfd388750a9a0bc4b9"
_FINEVISION_REVISION = "337dc8b3734ea439dd8af9ad5f8022148c2186c0"
_FINEWEB_REVISION = "3c452cb1c31a957685cf2699bfd051afacd37422"

_OBELICS_FOLDER = "opt_out_docs_removed_2023_07_12"
# The URLs of OBELICS stand in lists, which img2dataset does not read.
_OBELICS_URLS = f"""python -c "
import glob, os, pyarrow as pa, pyarrow.compute as pc, pyarrow.parquet as pq
os.makedirs('{RAW}/obelics/urls', exist_ok=True)
for path in glob.glob('{RAW}/obelics/{_OBELICS_FOLDER}/*.parquet'):
    urls = pc.list_flatten(pq.read_table(path, columns=['images'])['images']).drop_null()
    pq.write_table(pa.table({{'url': urls}}), '{RAW}/obelics/urls/' + os.path.basename(path))
\""""
_MMC4_DOCS = (  # 14 of the shards are missing
    "for shard in $(seq 0 23098); do "
    f"wget -q -nc -P {RAW}/mmc4_core/docs https://storage.googleapis.com/ai2-jackh-mmc4-public/data_core_v1.1/"
    "docs_no_face_shard_${shard}_v3.jsonl.zip || true; done"
)
_MMC4_URLS = (
    f"for file in {RAW}/mmc4_core/docs/*.zip; do unzip -p $file | jq -r '.image_info[].raw_url'; done "
    f"> {RAW}/mmc4_core/urls.txt"
)
_LLAVA_IMAGES = (
    f"mkdir -p {RAW}/llava_665k/images && cd {RAW}/llava_665k/images",
    "wget -P coco http://images.cocodataset.org/zips/train2017.zip",
    "wget -P gqa https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
    "wget -P textvqa https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
    "wget -P vg https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
    "wget -P vg https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
    "gdown --folder https://drive.google.com/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_ -O ocr_vqa",
    "for file in */*.zip; do unzip -q $file -d $(dirname $file); done",
)

SOURCES = (
    Source(
        name="recap_datacomp",
        title="Recap-DataComp-1B, every tenth file",
        part="captions",
        url="https://huggingface.co/datasets/UCSC-VLAA/Recap-DataComp-1B",
        revision=_RECAP_REVISION,
        licence="CC-BY-4.0",
        layout="webdataset",
        published=1_237_983_779,
        count=70_000_000,
        text_tokens=64,  # 49.4 words a caption (arXiv 2411.07461, table 1)
        bytes_per_sample=90_000,
        order="coin",
        text_first_share=0.5,
        visual_loss="generated",
        fetch=_steps(
            _hub_download(
                "UCSC-VLAA/Recap-DataComp-1B", _RECAP_REVISION, "recap_datacomp/urls", "data/train_data/train-*0-of-*"
            ),
            _download_images(
                f"{RAW}/recap_datacomp/urls/data/train_data",
                "recap_datacomp/images",
                "--input_format=parquet --url_col=url --caption_col=re_caption",
            ),
        ),
        inputs=f"{RAW}/recap_datacomp/images/*.tar",
        unverified=("share of URLs that still answer", "how the parquet files are numbered: the card says train-*"),
    ),
    Source(
        name="coyo",
        title="COYO-700M, 10 of 128 files",
        part="captions",
        url="https://huggingface.co/datasets/kakaobrain/coyo-700m",
        revision="",
        licence="CC-BY-4.0",
        layout="webdataset",
        published=747_000_000,
        count=30_000_000,
        text_tokens=16,
        bytes_per_sample=90_000,
        order="coin",
        text_first_share=0.3,  # alt text says little of the picture: better read than drawn from
        visual_loss="generated",
        fetch=_steps(
            _hub_download("kakaobrain/coyo-700m", "", "coyo/urls", "data/part-0000[0-9]-*"),
            _download_images(
                f"{RAW}/coyo/urls/data", "coyo/images", "--input_format=parquet --url_col=url --caption_col=text"
            ),
        ),
        inputs=f"{RAW}/coyo/images/*.tar",
        unverified=(
            "revision: the files came with 54ee2d8, whose full hash was not seen",
            "share of URLs that still answer",
        ),
    ),
    Source(
        name="cc12m",
        title="Conceptual 12M with its images",
        part="captions",
        url="https://huggingface.co/datasets/pixparse/cc12m-wds",
        revision=_CC12M_REVISION,
        licence="conceptual-12m (Google's own)",
        layout="webdataset",
        published=11_000_000,
        count=10_000_000,
        text_tokens=26,
        bytes_per_sample=100_000,
        order="coin",
        text_first_share=0.3,
        visual_loss="generated",
        fetch=_hub_download("pixparse/cc12m-wds", _CC12M_REVISION, "cc12m", "*.tar"),
        inputs=f"{RAW}/cc12m/*.tar",
        unverified=("exact count: the viewer says about 11M",),
    ),
    Source(
        name="blip3o_long",
        title="BLIP3o-Pretrain-Long-Caption",
        part="captions",
        url="https://huggingface.co/datasets/BLIP3o/BLIP3o-Pretrain-Long-Caption",
        revision="",
        licence="not found (a set derived from it states Apache-2.0)",
        layout="webdataset",
        published=27_200_000,
        count=24_000_000,
        text_tokens=120,
        bytes_per_sample=100_000,
        order="coin",
        text_first_share=0.5,
        visual_loss="generated",
        fetch=_hub_download("BLIP3o/BLIP3o-Pretrain-Long-Caption", "", "blip3o_long", "*.tar"),
        inputs=f"{RAW}/blip3o_long/*.tar",
        unverified=("revision", "licence", "exact count: the viewer says 27.2M", "names of the members of its tars"),
    ),
    Source(
        name="textatlas",
        title="TextAtlas5M, CleanTextSynth",
        part="ocr",
        url="https://huggingface.co/datasets/CSU-JPG/TextAtlas5M",
        revision=_TEXTATLAS_REVISION,
        licence="MIT",
        layout="parquet",
        published=2_000_000,
        count=1_900_000,
        epochs=2,
        text_tokens=100,
        bytes_per_sample=66_000,  # 67 files of some 1.9 GB
        order="coin",
        text_first_share=0.5,
        visual_loss="generated",
        fetch=_hub_download("CSU-JPG/TextAtlas5M", _TEXTATLAS_REVISION, "textatlas", "CleanTextSynth/*.parquet"),
        inputs=f"{RAW}/textatlas/CleanTextSynth/*.parquet",
        flags="--task=pair --image-column=image --caption-column=annotation",
        unverified=("exact count: a review of the paper says 2M", "name of the image column"),
    ),
    Source(
        name="docmatix",
        title="Docmatix, page images",
        part="ocr",
        url="https://huggingface.co/datasets/HuggingFaceM4/Docmatix",
        revision=_DOCMATIX_REVISION,
        licence="MIT",
        layout="parquet",
        published=1_273_215,
        count=1_200_000,
        epochs=2,
        text_tokens=300,
        images=1.9,
        bytes_per_sample=434_000,  # dataset_size of the card
        fetch=_hub_download("HuggingFaceM4/Docmatix", _DOCMATIX_REVISION, "docmatix", "data/train-*.parquet"),
        inputs=f"{RAW}/docmatix/data/*.parquet",
        flags="--task=conversation --image-column=images --texts-column=texts --turns=independent",
        unverified=("pages per sample",),
    ),
    Source(
        name="obelics",
        title="OBELICS without opted-out documents, 300 of 1,370 files",
        part="interleaved",
        url="https://huggingface.co/datasets/HuggingFaceM4/OBELICS",
        revision=_OBELICS_REVISION,
        licence="CC-BY-4.0",
        layout="interleaved",
        published=141_047_697,  # opted-out documents included
        count=20_000_000,
        text_tokens=815,  # 115B tokens in 141M documents
        images=2.5,  # 353M
        bytes_per_sample=230_000,
        stored_after_text=0.8,
        visual_loss="generated",
        fetch=_steps(
            _hub_download("HuggingFaceM4/OBELICS", _OBELICS_REVISION, "obelics", f"{_OBELICS_FOLDER}/train-00[0-2]*"),
            _OBELICS_URLS,
            _download_images(f"{RAW}/obelics/urls", "obelics/images", "--input_format=parquet --url_col=url", "files"),
            _image_map("obelics"),
        ),
        inputs=f"{RAW}/obelics/{_OBELICS_FOLDER}/*.parquet",
        flags=f"--images={RAW}/obelics/images --image-map={RAW}/obelics/images.tsv {DOCUMENT_BOUNDS}",
        unverified=("count without the opted-out documents", "share of URLs that still answer"),
    ),
    Source(
        name="mmc4_core",
        title="Multimodal C4, core, fewer faces",
        part="interleaved",
        url="https://github.com/allenai/mmc4",
        revision="v1.1",
        licence="ODC-BY, Common Crawl terms of use",
        layout="interleaved",
        published=5_500_000,
        count=5_000_000,
        text_tokens=327,  # 1.8B tokens in 5.5M documents
        images=4.1,  # 22.4M
        bytes_per_sample=370_000,
        stored_after_text=0.9,
        visual_loss="generated",
        fetch=_steps(
            _MMC4_DOCS,
            _MMC4_URLS,
            _download_images(f"{RAW}/mmc4_core/urls.txt", "mmc4_core/images", "--input_format=txt", "files"),
            _image_map("mmc4_core"),
        ),
        inputs=f"{RAW}/mmc4_core/docs/*.zip",
        flags=f"--documents=mmc4 --images={RAW}/mmc4_core/images --image-map={RAW}/mmc4_core/images.tsv "
        f"{DOCUMENT_BOUNDS}",
        unverified=("share of URLs that still answer",),
    ),
    Source(
        name="llava_665k",
        title="LLaVA-1.5 instruction mixture, 665K",
        part="vqa",
        url="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
        revision=_LLAVA_REVISION,
        licence="CC-BY-4.0",
        layout="llava",
        published=665_000,
        count=650_000,
        epochs=2,
        text_tokens=300,
        images=0.94,
        bytes_per_sample=160_000,
        fetch=_steps(
            _hub_download("liuhaotian/LLaVA-Instruct-150K", _LLAVA_REVISION, "llava_665k", "llava_v1_5_mix665k.json"),
            f"( {_steps(*_LLAVA_IMAGES)} )",
        ),
        inputs=f"{RAW}/llava_665k/llava_v1_5_mix665k.json",
        flags=f"--images={RAW}/llava_665k/images --turns=dialogue --choices=letter",
        unverified=(
            "share of OCR-VQA's images: the shared folder holds a script that fetches them",
            "whether OpenAI's terms bind the texts",
        ),
    ),
    Source(
        name="mammoth_vl",
        title="MAmmoTH-VL-Instruct-12M, single image",
        part="vqa",
        url="https://huggingface.co/datasets/MAmmoTH-VL/MAmmoTH-VL-Instruct-12M",
        revision=_MAMMOTH_REVISION,
        licence="Apache-2.0",
        layout="llava",
        published=10_000_000,
        count=9_500_000,
        text_tokens=450,  # 21,787,215,953 bytes of JSON for 10M
        bytes_per_sample=200_000,
        fetch=_steps(
            _hub_download(
                "MAmmoTH-VL/MAmmoTH-VL-Instruct-12M",
                _MAMMOTH_REVISION,
                "mammoth_vl",
                "mammoth_si_10M.json",
                "single_image_data/*.tar.gz",
            ),
            f"for file in {RAW}/mammoth_vl/single_image_data/*.tar.gz; do tar -xzf $file -C $(dirname $file); done",
        ),
        inputs=f"{RAW}/mammoth_vl/mammoth_si_10M.json",
        flags=f"--images={RAW}/mammoth_vl/single_image_data --turns=dialogue --choices=letter",
        unverified=(
            "exact count: 10M is in the file's name",
            "that image paths in the JSON start at single_image_data",
            "licences of the 153 sets that it is made of",
        ),
    ),
    Source(
        name="finevision",
        title="FineVision, a third of it drawn",
        part="vqa",
        url="https://huggingface.co/datasets/HuggingFaceM4/FineVision",
        revision=_FINEVISION_REVISION,
        licence="mixed: each sub-set its own; prompts CC-BY-4.0",
        layout="parquet",
        published=24_300_000,
        count=8_000_000,
        text_tokens=500,  # 9.5B answer tokens in 24.3M samples, and the questions
        images=0.71,  # 17.3M
        bytes_per_sample=206_000,  # 5 TB
        fetch=_hub_download("HuggingFaceM4/FineVision", _FINEVISION_REVISION, "finevision", "*/train-*.parquet"),
        inputs=f"{RAW}/finevision/*/*.parquet",
        flags="--task=conversation --image-column=images --texts-column=texts --turns=dialogue",
        unverified=("that the files are there at this revision, one of the card", "licences of its sub-sets"),
    ),
    Source(
        name="open_images",
        title="Open Images, training images with boxes",
        part="image_only",
        url="https://github.com/cvdfoundation/open-images-dataset",
        revision="V5",
        licence="images listed as CC-BY-2.0",
        layout="image_only",
        published=1_743_042,
        count=1_700_000,
        text_tokens=0,
        bytes_per_sample=294_000,  # 513 GB
        visual_loss="all",
        fetch=_steps(
            "for part in 0 1 2 3 4 5 6 7 8 9 a b c d e f; do aws s3 --no-sign-request cp "
            f"s3://open-images-dataset/tar/train_$part.tar.gz {RAW}/open_images/; done",
            f"gunzip {RAW}/open_images/*.tar.gz",
        ),
        inputs=f"{RAW}/open_images/*.tar",
    ),
    Source(
        name="imagenet_w21",
        title="ImageNet, Winter 2021 release in WebP, 400 of 1,024 files",
        part="image_only",
        url="https://huggingface.co/datasets/timm/imagenet-w21-webp-wds",
        revision="",
        licence="ImageNet terms: non-commercial research, on request",
        layout="image_only",
        published=13_151_276,
        count=4_800_000,
        text_tokens=0,
        bytes_per_sample=49_000,  # 645.65 GB
        visual_loss="all",
        fetch=_hub_download("timm/imagenet-w21-webp-wds", "", "imagenet_w21", "*-0[0-3]??.tar"),
        inputs=f"{RAW}/imagenet_w21/*.tar",
        unverified=("revision", "names of its tars: the card's own look copied from another set"),
    ),
    Source(
        name="fineweb_edu",
        title="FineWeb-Edu, sample of 10B tokens",
        part="text",
        url="https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu",
        revision=_FINEWEB_REVISION,
        licence="ODC-BY",
        layout="jsonl",
        published=9_670_000,
        count=9_500_000,
        text_tokens=1034,  # 10B tokens
        images=0,
        bytes_per_sample=4_900,
        fetch=_hub_download("HuggingFaceFW/fineweb-edu", _FINEWEB_REVISION, "fineweb_edu", "sample/10BT/*.parquet"),
        inputs=f"{RAW}/fineweb_edu/sample/10BT/*.parquet",
        flags="--max-chars=16000",  # some 3,500 tokens; a longer document becomes several records
        unverified=("exact count: read from a tokenized copy",),
    ),
)


def sources(scale: str = "1", root: str = PREPARED) -> dict[str, dict[str, Any]]:
    """`data.sources` of the mixture or of a twin. Weights and roles do not depend on the scale, the folders do.

    Repeats are capped at one above the recipe's, not at it: preparation drops some samples and keeps some for
    validation, and a pass in steps is an estimate, so a run may need a little more than a pass. A source at its cap is
    drawn no more; when all are, the loader stops with a message.

    Args:
        scale: one of `SCALES`.
        root: folder of the prepared sources, or of those of the twins.

    Raises:
        ValueError: there is no twin of this scale.
    """
    folder = _prepared_folder(scale, root)
    return {
        source.name: {
            "path": f"{folder}/{source.name}",
            "weight": source.weight,
            "augment": "none",
            "order": source.order,
            "text_first_share": source.text_first_share,
            "text_loss": source.text_loss,
            "visual_loss": source.visual_loss,
            "max_epochs": float(source.epochs + 1),
        }
        for source in SOURCES
    }


def _prepared_folder(scale: str, root: str) -> str:
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r}: there are {', '.join(SCALES)}")
    return root if scale == "1" else f"{root}-1-{scale}"


def scaled_count(source: Source, scale: str) -> int:
    """Samples of a source at a scale; at least one."""
    return max(round(source.count / int(scale)), 1)


def prepare_command(source: Source, scale: str = "1") -> str:
    """The command that turns the raw set into the prepared folder of a scale.

    A folder may hold more records than `count`: the weights decide what is drawn. For a twin, name so few of the raw
    files that they hold the count.
    """
    num_shards = math.ceil(scaled_count(source, scale) * source.bytes_per_sample / SHARD_BYTES)
    extra = f" {source.flags}" if source.flags else ""
    return (
        f"python -m data_pipelines.convert {source.layout} --input '{source.inputs}'{extra} "
        f"--output={_prepared_folder(scale, PREPARED)}/{source.name} --tokenizer={TOKENIZER} "
        f'--licence="{source.licence}" --val-share=0.001 --num-shards={num_shards} {IMAGE_SPEC}'
    )


@dataclasses.dataclass(frozen=True)
class Cost:
    """What draws of a pass take.

    Attributes:
        samples: draws.
        disk: bytes of the prepared records.
        text, visual: tokens of text and of images.
        positions: of rows: all tokens, two marks per image and the end of each sample.
        generating: draws with an image that carries the visual loss.
        generated: visual tokens that carry it.
    """

    samples: float
    disk: float
    text: float
    visual: float
    positions: float
    generating: float
    generated: float


def cost_of(source: Source, scale: str = "1", image_tokens: int = IMAGE_TOKENS) -> Cost:
    """The cost of a source in one pass at a scale."""
    count = scaled_count(source, scale)
    samples = count * source.epochs
    visual = samples * source.images * image_tokens
    return Cost(
        samples=samples,
        disk=count * source.bytes_per_sample,
        text=samples * source.text_tokens,
        visual=visual,
        positions=samples * (source.text_tokens + source.images * (image_tokens + 2) + 1),
        generating=samples * source.generated_share,
        generated=visual * source.generated_share,
    )


def total(costs: Sequence[Cost]) -> Cost:
    """The sum of costs, field by field."""
    names = [field.name for field in dataclasses.fields(Cost)]
    return Cost(**{name: sum(getattr(cost, name) for cost in costs) for name in names})


def num_steps(positions: float, row_tokens: int, batch_rows: int) -> int:
    """Steps that a pass takes, if no sample is longer than a row."""
    return math.ceil(positions / (row_tokens * batch_rows * ROW_FILL))


def dry_run(scale: str, row_tokens: int, batch_rows: int, image_tokens: int, commands: bool) -> str:
    """The recipe as text: a table of the sources, totals, what is not known, and the commands if asked for."""
    costs = [cost_of(source, scale, image_tokens) for source in SOURCES]
    lines = [
        "Mixture public_200m: ours, the paper's is unknown. Tokens and bytes are estimates."
        + (f" Twin of 1/{scale}." if scale != "1" else ""),
        "",
        *_table(costs, scale),
        "",
        *_totals(total(costs), row_tokens, batch_rows),
        "",
        *_unknown(),
    ]
    if commands:
        for source in SOURCES:
            lines += ["", f"# {source.name}: {source.title}", source.fetch, prepare_command(source, scale)]
    return "\n".join(lines)


def _table(costs: Sequence[Cost], scale: str) -> list[str]:
    heads = ("source", "part", "count", "epochs", "weight", "order", "text loss", "visual loss", "disk", "text tokens",
             "visual tokens", "licence")  # fmt: skip
    rows = [
        (
            source.name,
            source.part,
            f"{scaled_count(source, scale):,}",
            f"{source.epochs:g}",
            f"{source.weight:.4f}",
            f"coin, {source.text_first_share:g} text first" if source.order == "coin" else source.order,
            source.text_loss,
            source.visual_loss,
            _short(cost.disk, "B"),
            _short(cost.text),
            _short(cost.visual),
            source.licence,
        )
        for source, cost in zip(SOURCES, costs, strict=True)
    ]
    return align([heads, *rows])


def _totals(sum_of: Cost, row_tokens: int, batch_rows: int) -> list[str]:
    steps = num_steps(sum_of.positions, row_tokens, batch_rows)
    return [
        f"samples of a pass   {sum_of.samples:,.0f}",
        f"disk, prepared      {_short(sum_of.disk, 'B')}",
        f"tokens              {_short(sum_of.text)} text, {_short(sum_of.visual)} visual, "
        f"{_short(sum_of.positions)} positions in rows",
        f"training steps      {steps:,} of {batch_rows} rows of {row_tokens} tokens",
        f"generation share    {sum_of.generating / sum_of.samples:.4f} of samples, "
        f"{sum_of.generated / sum_of.visual:.4f} of visual tokens, "
        f"{sum_of.generated / sum_of.positions:.4f} of positions carry the visual loss",
    ]


def _unknown() -> list[str]:
    lines = ["revision and what is unverified:"]
    for source in SOURCES:
        lines.append(f"  {source.name:<15} {source.revision or 'pin before use'}  {source.url}")
        lines += [f"  {'':<15} unverified: {fact}" for fact in source.unverified]
    return lines


def _short(number: float, unit: str = "") -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.4g} {prefix}{unit}"
    return f"{number:,.0f} {unit}".rstrip()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Prints the dry run; returns the exit code."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.mixtures.public_200m", description=summary)
    parser.add_argument("--scale", choices=SCALES, default="1", help="1: the mixture; 10, 1000: its twins")
    parser.add_argument("--row-tokens", type=_positive, default=4096, help="data.row_tokens")
    parser.add_argument("--batch-rows", type=_positive, default=256, help="train.global_batch_rows")
    parser.add_argument("--image-tokens", type=_positive, default=IMAGE_TOKENS, help="visual tokens of an image")
    parser.add_argument("--commands", action="store_true", help="also print what fetches and prepares each source")
    flags = parser.parse_args(arguments)
    print(dry_run(flags.scale, flags.row_tokens, flags.batch_rows, flags.image_tokens, flags.commands))
    return 0


if __name__ == "__main__":
    sys.exit(main())
