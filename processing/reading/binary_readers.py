"""Parquet files, WebDataset's archives and folders of images, of which one bad part costs itself alone.

A parquet file loses the row groups that cannot be read, an archive the sample whose file cannot be decoded and what
lies behind the place where it breaks off, a folder of images the line of its metadata that names no file inside it.
"""

import io
import json
import posixpath
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext
from datasets.utils.file_utils import xopen

from .conversations import ODD
from .csv_reader import csv_rows
from .json_reader import json_rows, table_of_rows
from .odd import UNREACHED, UNREADABLE, base_name, is_alone, odd_column, reason, spared, with_odd


class ParquetReader(Parquet):
    """Parquet files."""

    def _split_generators(self, dl_manager):
        given, self.config.on_bad_files = self.config.on_bad_files, "error" if is_alone(self.config) else "skip"
        splits = super()._split_generators(dl_manager)
        self.config.on_bad_files = given
        columns = dict(self.info.features)
        for file in (file for split in splits for file in split.gen_kwargs["files"] if "://" not in file):
            try:
                columns = {**datasets.Features.from_arrow_schema(pq.read_schema(file)), **columns}
            except UNREADABLE:
                continue  # it is named where its rows would be
        self.info.features = with_odd(datasets.Features({**self.info.features, **columns}))
        return splits

    def _cast_table(self, pa_table: pa.Table) -> pa.Table:
        columns = self.info.features.arrow_schema
        if unknown := [name for name in pa_table.column_names if name not in columns.names]:
            raise ValueError(f"a column {unknown[0]}, which the first file has not")
        for field in columns:
            if field.name not in pa_table.column_names or field.name == ODD:
                empty = pa.nulls(len(pa_table), field.type)
                kept = pa_table.drop_columns(ODD) if field.name in pa_table.column_names else pa_table
                pa_table = kept.append_column(field.name, empty)
        return super()._cast_table(pa_table)

    def _generate_tables(self, files, row_groups_list):
        for shard, (file, groups) in enumerate(zip(files, row_groups_list)):
            yield from spared(shard, file, is_alone(self.config), self._tables(file, groups), self._odd_rows)

    def _generate_more_gen_kwargs(self, files, row_groups_list):
        for file, groups in zip(files, row_groups_list):
            try:
                more = list(super()._generate_more_gen_kwargs([file], [groups]))
            except UNREADABLE as error:
                if isinstance(error, UNREACHED):
                    raise
                more = [{"files": [file], "row_groups_list": [groups]}]
            yield from more

    def _tables(self, file: str, groups: tuple[int, ...] | None) -> Iterator[pa.Table]:
        done = 0
        try:
            for _, table in super()._generate_tables([file], [groups]):
                yield table
                done += len(table)
        except UNREADABLE as error:
            if isinstance(error, UNREACHED):
                raise
            with xopen(file, "rb", download_config=datasets.DownloadConfig(token=self.token)) as opened:
                metadata = pq.read_metadata(opened)  # raises for what is no parquet file at all
            end = 0
            for group in groups or range(metadata.num_row_groups):
                end += metadata.row_group(group).num_rows
                if end <= done:
                    continue
                why = f"row group {group} of {base_name(file)}: not readable ({reason(error)})"
                if groups is None and done <= end - metadata.row_group(group).num_rows:
                    yield from self._tables(file, (group,))
                else:
                    yield self._odd_rows(why, end - done)
                done = end

    def _odd_rows(self, why: str, count: int = 1) -> pa.Table:
        schema = self.info.features.arrow_schema
        odd = odd_column([json.dumps(why)] * count)
        arrays = [odd if field.name == ODD else pa.nulls(count, field.type) for field in schema]
        return pa.Table.from_arrays(arrays, schema=schema)


class ArchiveReader(WebDataset):
    """WebDataset's tar files: a sample is the files of one name."""

    def _split_generators(self, dl_manager):
        files = dl_manager.download(self.config.data_files)
        archives = {split: [dl_manager.iter_archive(path) for path in paths] for split, paths in files.items()}
        if not self.info.features:
            paths, found = next(iter(files.values())), next(iter(archives.values()))
            samples = chain.from_iterable(self._samples(path, tar) for path, tar in zip(paths, found))
            first = list(islice((s for s in samples if ODD not in s), self.NUM_EXAMPLES_FOR_FEATURES_INFERENCE))
            if not first:
                next(iter(found[0]))  # raises for what is no archive
                raise ValueError("no sample of files that share a name, as in WebDataset's archives")
            self.info.features = self._features(first)
        self.info.features = with_odd(self.info.features)
        return [
            datasets.SplitGenerator(
                name=split, gen_kwargs={"tar_paths": files[split], "tar_iterators": archives[split]}
            )
            for split in files
        ]

    def _features(self, samples: list[dict[str, Any]]) -> datasets.Features:
        """The columns of all files that some samples have."""
        columns: dict[str, Any] = {}
        for name, value in ((name, value) for sample in samples for name, value in sample.items()):
            suffix = name.rsplit(".", 1)[-1].lower()
            if suffix in self.IMAGE_EXTENSIONS:
                columns[name] = datasets.Image()
            elif isinstance(value, (dict, list)) or columns.get(name) == datasets.Json():
                columns[name] = datasets.Json()
            else:
                columns[name] = datasets.Features.from_arrow_schema(pa.table({name: [value]}).schema)[name]
        names = sorted(columns, key=("__key__", "__url__").__contains__)
        return datasets.Features({name: columns[name] for name in names})

    def _generate_examples(self, tar_paths, tar_iterators):
        for shard, (path, archive) in enumerate(zip(tar_paths, tar_iterators)):
            for number, sample in enumerate(self._samples(path, archive)):
                yield Key(shard, number), self._fitted(sample)

    def _fitted(self, sample: dict[str, Any]) -> dict[str, Any]:
        features = self.info.features
        if ODD not in sample:
            where = f"sample {sample['__key__']} of {base_name(sample['__url__'])}"
            sample = self._with_known_suffix(sample)
            if unknown := [name for name in sample if name not in features]:
                sample = {ODD: f"{where}: a file .{unknown[0]}, which none of the first samples has"}
        whole = {name: sample.get(name) for name in features}
        for name, feature in features.items():
            if isinstance(feature, datasets.Image) and whole[name] is not None:
                whole[name] = {"path": f"{sample['__key__']}.{name}", "bytes": whole[name]}
        try:
            features.encode_example(whole)
        except UNREADABLE as error:
            return {**dict.fromkeys(features), ODD: f"{where}: not as the first samples are ({reason(error)})"}
        return whole

    def _with_known_suffix(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A sample whose only image has another suffix than those of the first samples, under their suffix."""
        known, own = (
            [name for name in names if name.rsplit(".", 1)[-1].lower() in self.IMAGE_EXTENSIONS]
            for names in (self.info.features, sample)
        )
        if len(known) == len(own) == 1 and known != own:
            sample = {**sample, known[0]: sample[own[0]]}
            del sample[own[0]]
        return sample

    def _samples(self, path: str, archive: Any) -> Iterator[dict[str, Any]]:
        """The samples of an archive; one of which a file cannot be read holds nothing but the reason."""
        sample: dict[str, Any] = {}
        complete = True
        try:
            for filename, file in archive:
                key, field = base_plus_ext(filename)
                if key is None:
                    continue
                if sample and sample["__key__"] != key:
                    yield _without_rest(sample)
                    sample = {}
                where, twice = f"sample {key} of {base_name(path)}", field in sample
                sample.update({"__key__": key, "__url__": path})
                complete = False  # should the archive break off in this file
                content = io.BytesIO(file.read())
                complete = True
                if twice:
                    sample[ODD] = f"{where}: two files .{field}"
                    continue
                try:
                    (found,) = self._get_pipeline_from_tar(path, [(filename, content)])
                    sample[field] = found[field]
                except Exception as error:  # decoders raise nearly anything
                    sample[ODD] = f"{where}: its .{field} is not readable ({reason(error)})"
        except UNREADABLE as error:
            if isinstance(error, UNREACHED) or not sample and is_alone(self.config):
                raise
            if not complete:
                sample[ODD] = f"sample {sample['__key__']} of {base_name(path)}: not readable ({reason(error)})"
            if sample:
                yield _without_rest(sample)
            yield {ODD: f"{base_name(path)}: not readable, or not to its end ({reason(error)})"}
        else:
            if sample:
                yield _without_rest(sample)


def _without_rest(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample, or nothing but the reason why it is none."""
    return {name: sample[name] for name in ("__key__", "__url__", ODD)} if ODD in sample else sample


class ImageFolderReader(ImageFolder):
    """Folders of images with a file of metadata."""

    def _read_metadata(self, metadata_file, metadata_ext=""):
        done = 0
        try:
            for table in super()._read_metadata(metadata_file, metadata_ext=metadata_ext):
                table.validate(full=True)
                yield _with_names_inside(table)
                done += len(table)
        except UNREADABLE as error:
            if isinstance(error, UNREACHED) or metadata_ext not in (".csv", ".jsonl"):
                raise
            yield from self._row_by_row(metadata_file, metadata_ext, done)

    def _row_by_row(self, file: str, kind: str, done: int) -> Iterator[pa.Table]:
        rows: Iterator[dict[str, Any] | str]
        if kind == ".csv":
            header, cells = csv_rows(file)
            rows = (row if isinstance(row, str) else {n: c or None for n, c in zip(header, row)} for row in cells)
        else:
            rows = json_rows(file)
        yield _with_names_inside(table_of_rows(list(islice(rows, done, None))))

    def _generate_examples(self, *arguments, **options):
        for key, sample in super()._generate_examples(*arguments, **options):
            features = self.info.features
            whole = {**dict.fromkeys(features), **sample}
            try:
                if unknown := [name for name, value in whole.items() if name not in features and value is not None]:
                    raise ValueError(f"{unknown[0]} is no column of the first rows")
                whole = {name: whole[name] for name in features}
                features.encode_example(whole)
            except UNREADABLE as error:
                why = f"its metadata are not as those of the first rows ({reason(error)})"
                whole = {**dict.fromkeys(features), ODD: why}
            yield key, whole


def _with_names_inside(table: pa.Table) -> pa.Table:
    """Metadata of which each row names files of its own folder, or says in `ODD` that it does not."""
    odd = table[ODD].to_pylist() if ODD in table.column_names else [None] * len(table)
    for name in table.column_names:
        if name in ("file_name", "file_names") or name.endswith(("_file_name", "_file_names")):
            values = table[name].to_pylist()
            for row, value in enumerate(values):
                paths = value if isinstance(value, list) else [value]
                if outside := next((path for path in paths if not _is_inside(path)), None):
                    values[row], odd[row] = None, json.dumps(f"the image {outside} lies outside the data set's folder")
                if values[row] is None and name.endswith("file_names"):
                    values[row] = [None]  # the library wants a list with something in it
            place, kind = table.column_names.index(name), table.schema.field(name).type
            table = table.set_column(place, name, pa.array(values, kind))
    table = table.drop_columns(ODD) if ODD in table.column_names else table
    return table.append_column(ODD, odd_column(odd))


def _is_inside(path: str | None) -> bool:
    if not isinstance(path, str):
        return True
    if "://" in path:
        return False
    path = posixpath.normpath(path.replace("\\", "/"))
    return not path.startswith(("/", "../")) and path != ".." and path[1:2] != ":"
