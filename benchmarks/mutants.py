"""This is the list of mutations that mutations.py tries.

Each has a file, the tests that should fail, and the texts before and after.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """The text `old`, which is in `file` exactly once, is replaced by `new`. `tests` are arguments of pytest."""

    file: str
    tests: str
    old: str
    new: str


GEOMETRY = "tests/test_geometry.py -k 'not partition'"
TILES = "tests/test_geometry.py -k tiles"
PLAN = "tests/test_plan.py -k 'not ten_million'"
LEASES = "tests/test_leases.py"
LEDGER = "tests/test_ledger.py"
VERIFY = "tests/test_verify.py tests/test_verify_lost_plan.py -k 'not any_rot'"
LOCK = "tests/test_target_lock.py"
KV = "tests/test_kv.py"
SWAPPED = "tests/test_swapped_file.py"
TARGETS = "tests/test_targets.py"
SHARDING = "tests/test_precomputed_morton.py"
SOURCES = "tests/test_source_metadata.py tests/test_sources.py -k 'Voxel or after_a or TestLevels'"
N5 = "tests/test_n5.py"
JPEG_XL = "tests/test_jpeg_xl.py"
INTERRUPTS = "tests/test_run.py -k ctrl_c"
SIZE = "tests/test_at_size.py"
COPIES = "tests/test_stragglers.py -k 'no_other_worker or has_gone'"
WORKER = "tests/test_worker.py tests/test_bad_sections.py -k 'worker or empty_output'"
INFERENCE = "tests/test_inference.py"
PRICE = "tests/test_plan.py -k 'by_hand or input_voxels'"
DEVICE_PRICE = "tests/test_price.py -k 'formula or overlap or slowest or as_long or nearest or files or must or take'"
REQUESTS = "tests/test_requests.py -k 'not third'"
WATCHDOG = "tests/test_watchdog.py"
QUALITY = "tests/test_section_quality.py -k 'not undamaged and not destroyed'"
LOSSES = "tests/test_training_losses.py tests/test_training_samples.py"
AHEAD = "tests/test_train_ahead.py -k 'order or error or busy or left_out or not_fused'"
PRECISION = "tests/test_train_precision.py -k 'float32_on or take_tf32 or keeps or earlier_word_is'"
GOLDEN = "tests/test_golden.py -k 'vectors and x8'"
"""These tests read files in EMSR_SHARED."""
BANDS = "tests/test_bands.py"
DOCTOR = "tests/test_doctor.py -k 'must_reach or overflow or build_of_torch or same_tile'"

_BY_FILE: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("pipeline/base/geometry.py", GEOMETRY): [
        ("return (self.stop - self.start).maximum(0)", "return self.stop - self.start"),
        (
            "return Box(start, self.stop.minimum(other.stop).maximum(start))",
            "return Box(start, self.stop.minimum(other.stop))",
        ),
        ("return other.empty or self.intersect(other) == other", "return self.intersect(other) == other"),
        (
            "return ZYX(self.z, self.y * factor, self.x * factor)",
            "return ZYX(self.z * factor, self.y * factor, self.x * factor)",
        ),
        ("return Box(self.start // f, self.stop.ceil_div(f))", "return Box(self.start // f, self.stop // f)"),
        (
            "        return Box(self.start // f, self.stop.ceil_div(f))",
            "        return Box(self.start.ceil_div(f), self.stop.ceil_div(f))",
        ),
        ("slice(self.start.y - o.y, self.stop.y - o.y)", "slice(self.start.y - o.x, self.stop.y - o.x)"),
    ],
    ("pipeline/base/geometry.py", TILES): [
        ("return self._each(other, lambda a, b: -(-a // b))", "return self._each(other, lambda a, b: a // b + 1)"),
        (
            "        for y in range(first.y, last.y):\n            for x in range(first.x, last.x):",
            "        for x in range(first.x, last.x):\n            for y in range(first.y, last.y):",
        ),
    ],
    ("pipeline/base/geometry.py", REQUESTS): [
        ("(box.stop.ceil_div(shape) - box.start // shape).product", "(box.stop - box.start).ceil_div(shape).product"),
    ],
    ("pipeline/plan/lattice.py", PLAN): [
        ("return self.cell + 2 * self.halo", "return self.cell + self.halo"),
        (
            "(box.start // cells) * cells, box.stop.ceil_div(cells) * cells",
            "(box.start // cells) * cells, box.stop // cells * cells",
        ),
        ("grow(ZYX(self.z_halo, self.halo, self.halo))", "grow(ZYX(0, self.halo, self.halo))"),
    ],
    ("pipeline/plan/lattice.py", INFERENCE): [
        ("return self.window // 2", "return (self.window + 1) // 2"),
    ],
    ("pipeline/plan/plan.py", PLAN): [
        ('step = 1 if axis == "z" else 2**k', "step = 2**k"),
        ("if size < total and (size % step", "if (size % step"),
        ("enumerate(self.levels[:1] if self.lossy else self.levels)", "enumerate(self.levels)"),
        ("iy, ix = divmod(column, grid.x)", "iy, ix = divmod(column, grid.y)"),
        ("self.lattice.with_halo(lr).intersect(self.bounds)", "self.lattice.with_halo(lr).intersect(self.region)"),
        (
            "return (i.y * self.grid.x + i.x) * self.grid.z + i.z",
            "return (i.y * self.grid.y + i.x) * self.grid.z + i.z",
        ),
        (
            "read = write.lateral(2).intersect(Box(ZYX(0, 0, 0), self.levels[level - 1].shape))",
            "read = write.lateral(2)",
        ),
        ("return block.write.lateral(2**block.level)", "return block.write.lateral(2 ** (block.level - 1))"),
        ("step = lcm(finer.chunk.y, 2)", "step = finer.chunk.y"),
        ("return (index // self.grid.z + 1) * self.grid.z", "return (index // self.grid.z + 2) * self.grid.z"),
        ("if slab.lr.start.z <= z < slab.lr.stop.z]", "if slab.lr.start.z <= z <= slab.lr.stop.z]"),
        ("for near in (z - d, z + d):", "for near in (z + d, z - d):"),
        ("for d in range(1, self.bounds.shape.z):", "for d in range(1, self.bounds.shape.z - 1):"),
    ],
    ("pipeline/prepare/layout.py", PLAN): [
        (
            "piece = ZYX(shard.z, shard.y // scale, shard.x // scale)",
            "piece = ZYX(shard.z, shard.x // scale, shard.y // scale)",
        ),
        ("if b * factor % s:", "if b % s:"),
        ("max(shape.y, shape.x) > 2 ** (count - 1) * 2 *", "max(shape.y, shape.x) >= 2 ** (count - 1) * 2 *"),
        ("if target.mips > most:", "if target.mips >= most:"),
        (
            "size = ZYX(shape.z, -(-shape.y // 2**k), -(-shape.x // 2**k))",
            "size = ZYX(shape.z, shape.y // 2**k, shape.x // 2**k)",
        ),
        ("== 0 and part.y % chunk.y == part.x % chunk.x == 0", "== 0"),
        ("return fitting[-1]\n", "return fitting[0]\n"),
        ("return fitting[-1] if fitting else n", "return fitting[0] if fitting else n"),
        ("min(m // s, -(-e // s))", "min(m // s, e // s)"),
        ("ZYX(min(CHUNK.z, extent.z), CHUNK.y, CHUNK.x)", "CHUNK"),
    ],
    ("pipeline/schedule/leases.py", LEASES): [
        ("if self._copies >= self._ramp.limit(", "if self._copies > self._ramp.limit("),
        ("if self._suspects and not self._out:", "if self._suspects:"),
        ("if lease.copies and (not receipts or any(", "if lease.copies and (any("),
        ("            self._left += len(rest)\n", ""),
        ("            self._left += len(lease.span)\n", ""),
        ("self._returned.appendleft(span[most:])", "self._returned.append(span[most:])"),
        ("limit = min(start + most, self._plan.column_end(start))", "limit = start + most"),
        ("min(MAX_LEASE_TASKS, int(lease_s / task_s))", "int(lease_s / task_s)"),
        ("if capacity.workers < 2 or", "if capacity.workers < 1 or"),
        ("now - self._searched_at < 1.0", "now - self._searched_at < 0.0"),
        ("len(self._recent_s) * 9 // 10", "len(self._recent_s) * 5 // 10"),
        ("and lease.starts < MAX_STARTS", "and lease.starts <= MAX_STARTS"),
        ("        and not lease.alone\n", ""),
        ("                lease.started = now\n", ""),
        (
            "min((lease.tasks_ahead + len(lease.span)) * slow_s, 2 * lease.max_s) + slow_s",
            "(lease.tasks_ahead + len(lease.span)) * slow_s + slow_s",
        ),
        ("self._largest = len(lease.span)", "self._largest = 0"),
        ("        self._copies -= lease.copies\n", ""),
        ("0.7 * self._mean_s + 0.3 * mean", "0.3 * self._mean_s + 0.7 * mean"),
        ("            self._suspects.append(start)\n            return ()", "            pass"),
        ("\n        and lease.copies < capacity.workers", ""),
        (" for r in receipts if r.state == WRITTEN", " for r in receipts"),
    ],
    ("pipeline/schedule/ramp.py", f"tests/test_ramp.py {LEASES}"): [
        ("max(0.0, now - self._risen_at)", "now"),
        ("self._stepped_back, self._risen_at = True, now", "self._stepped_back = True"),
        ("SLOWER * self._limit / max(LOOK_S, self._lease_s)", "SLOWER * per_s"),
        ("BACK * min(self._limit, out)", "BACK * self._limit"),
        ("        if now < self._weighed_at:\n            return\n", ""),
        ("self._refused > MAX_REFUSED * self._tasks", "self._refused >= MAX_REFUSED * self._tasks"),
    ],
    ("pipeline/schedule/in_flight.py", SIZE): [
        ("if not (changed and self._hand_ons.due(began)):", "if not self._hand_ons.due(began):"),
    ],
    ("pipeline/storage/ledger.py", SIZE): [
        ("SNAPSHOT_EVERY and not self._queued:", "SNAPSHOT_EVERY:"),
        ("itertools.islice(quarantined, MAX_REASONS, None)", "itertools.islice(quarantined, 10000, None)"),
    ],
    ("pipeline/plan/task_states.py", LEDGER): [
        (
            "block = self._state[start : min(start + BLOCK, span.stop)]",
            "block = self._state[start : start + BLOCK]",
        ),
    ],
    ("pipeline/schedule/findings.py", VERIFY): [
        ("written & ~known", "written & ~written"),
        ("elif receipt.error:", "elif False:"),
        ("receipt.checksum != self._checksums[index]", "False"),
        ("for block in self._plan.averaged_from(index):", "for block in ():"),
        ("if receipt.state == QUARANTINED:", "if False:"),
        ("            self._ledger.record([Receipt(index, PENDING)])", "            pass"),
    ],
    ("pipeline/worker/stored.py", VERIFY): [
        (
            "            if any(receipt.error for receipt in receipts):\n                self.check(job)",
            "            if False:\n                pass",
        ),
        ("!= self.client_view:", "is None:"),
        ("missing.append(key)", "pass"),
    ],
    ("pipeline/schedule/execute.py", VERIFY): [
        ("if tasks.state(block) == WRITTEN]", "if False]"),
    ],
    ("pipeline/prepare/place.py", VERIFY): [
        ("    open_target(prepared.job.target).refuse_foreign()\n", ""),
        ("    if ledger.folder(job.digest) in ledgers and", "    if False and"),
    ],
    ("pipeline/prepare/place.py", "tests/test_fills.py"): [
        ("    return prepared.later == prepared.later | later", "    return True"),
        (
            "    later = stored.later if stored is not None else",
            "    later = prepared.later if stored is not None else",
        ),
    ],
    ("pipeline/prepare/stored_plan.py", "tests/test_fills.py"): [
        ("(job.digest, later)\n", "(job.digest, stored.later)\n"),
        ("        if later and body", "        if False and body"),
    ],
    ("pipeline/storage/sources/grey_values.py", "tests/test_grey_values.py"): [
        ("        value += 0.5\n", ""),
        ("section.astype(np.float64)", "section"),
        ("(above * 510 + (high - low))", "(above * 510)"),
        ("        table = np.bitwise_not(table) if invert else table\n", ""),
    ],
    ("pipeline/storage/ledger.py", LEDGER): [
        ("        self._state[:] = PENDING\n", ""),
        ("self.bytes_written, self._since_snapshot, self.times = 0, 0, TaskTimes()", "self._since_snapshot = 0"),
        ("        self.damaged.clear()\n", ""),
        ("key=lambda name: (_seq(name), name))", "key=lambda name: (-_seq(name), name))"),
        ("max(map(_seq, segments + snapshots), default=0)", "max(map(_seq, snapshots), default=0)"),
        ("for name in reversed(snapshots):", "for name in snapshots:"),
        ("if _NAME.fullmatch(n))", "if n)"),
        ('records[records["state"] == WRITTEN]\n            checksums', "records\n            checksums"),
        ('known[written["index"]] = True', "known[:] = True"),
        ("zlib.crc32(body, zlib.crc32(name.encode()))", "zlib.crc32(body)"),
        ("if _seq(n) > start]", "if _seq(n) >= start]"),
        ('int(records["index"].max()) >= self.tasks', 'int(records["index"].max()) > self.tasks'),
        (
            "or (len(self._queued) < FLUSH_RECORDS and now - self._flushed < FLUSH_S)",
            "or (len(self._queued) < FLUSH_RECORDS or now - self._flushed < FLUSH_S)",
        ),
        ("self._failing_since = self._failing_since or now", "self._failing_since = now"),
        ("        self._seq += 1\n", "        self._queued.clear()\n        self._seq += 1\n"),
        ('return body if wanted == struct.unpack("<I", value[8:12])[0] else None', "return body"),
        ("self._state = (low + 2 * high).astype(np.uint8)", "self._state = (2 * low + high).astype(np.uint8)"),
        ('if done["seconds"][worst] > self.slowest:', 'if done["seconds"][worst] < self.slowest:'),
        (
            'int(records["bytes"].sum())\n        del self._queued',
            'int(records["bytes"].max())\n        del self._queued',
        ),
    ],
    ("pipeline/storage/store_errors.py", KV): [
        (
            '"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN"}',
            '"DEADLINE_EXCEEDED"}',
        ),
        ("    if number in _FULL:", "    if False:"),
        ("code = _CODE.match(text)", "code = _CODE.search(text)"),
    ],
    ("pipeline/storage/kv.py", KV): [
        ("        if failed:\n            raise failed\n\n    def put_if", "\n    def put_if"),
        ("chr(ord(prefix[-1]) + 1)", "chr(ord(prefix[-1]) + 2)"),
        ("if not files.is_own(name := ", "if (name := "),
        ("                batch = []\n        yield from self._get_batch(batch)", "                batch = []"),
    ],
    ("pipeline/storage/targets/encode.py", TARGETS): [
        ("or not aligned or any(box.start % level.shard)", "or not aligned"),
        ('"store_data_equal_to_fill_value": True', '"store_data_equal_to_fill_value": False'),
        ('"fill_missing_data_reads": False', '"fill_missing_data_reads": True'),
        ("if store.get(key) is not None:", "if store.get(key) is None:"),
        ("if not voxels[tile.slices(box.start)].any()]", "if not voxels[tile.slices(box.start)].all()]"),
        ("if isinstance(fault, (TransientError, UserError)):", "if isinstance(fault, UserError):"),
        ("if view.shape != tuple(array.level.shape):", "if False:"),
    ],
    ("pipeline/evaluation/place.py", "tests/test_evaluate_places.py"): [
        ("common = Box(ZYX(0, 0, 0) - offset, theirs - offset)", "common = Box(ZYX(0, 0, 0), theirs)"),
        ("    if common.empty:", "    if False:"),
        ("    if not config.crop and offset != ZYX(0, 0, 0):", "    if False:"),
        ("rel_tol=SAME) for a, b in zip(ours", "rel_tol=2) for a, b in zip(ours"),
        ("half = (scale - 1) / 2", "half = scale / 2"),
        ("if sr.bounds.shape != truth.bounds.shape and config.crop:", "if False:"),
    ],
    ("pipeline/evaluation/scored_voxels.py", "tests/test_evaluate_places.py"): [
        ("        if z in self.left_empty:\n            return\n", ""),
        ("            if self.ledger.state(index) == WRITTEN:\n", "            if True:\n"),
        ("        if left:\n", "        if False:\n"),
        ("np.arange(span.start, span.stop) + 0.5", "np.arange(span.start, span.stop) - 0.5"),
    ],
    ("models/evaluation/fidelity.py", "tests/test_evaluate_places.py"): [
        ("squares[valid].mean()", "squares.mean()"),
        ("centres[whole].mean()", "centres.mean()"),
    ],
    ("pipeline/config/yaml_file.py", "tests/test_limits.py"): [
        ("        if next(values) > MAX_YAML_VALUES:", "        if next(values) > 10**7:"),
        ("        if len(data) > MAX_YAML_BYTES:", "        if False:"),
    ],
    ("pipeline/storage/http_body.py", "tests/test_limits.py"): [
        ("unzip.decompress(block, BLOCK) if unzip", "unzip.decompress(block) if unzip and False"),
        ("            if len(found) > most:", "            if len(found) > most + 1:"),
    ],
    ("pipeline/storage/sources/unpacked_size.py", "tests/test_limits.py"): [
        ("        if size > most:", "        if size >= most:"),
    ],
    ("pipeline/prepare/mask_reach.py", "tests/test_masks.py"): [
        ("    if not touched and looked == plan.slabs:", "    if not touched:"),
        ("(SAMPLE if touched else MAX_LOOKED)", "MAX_LOOKED"),
        ("    if mask_box(mask, source, region).empty:", "    if False:"),
    ],
    ("pipeline/worker/mask.py", "tests/test_worker.py"): [
        ("(lo - mask.corner_nm[axis]) / size + 1e-6", "(lo - mask.corner_nm[axis]) / size - 1e-6"),
        ("(hi - mask.corner_nm[axis]) / size - 1e-6", "(hi - mask.corner_nm[axis]) / size + 1e-6"),
        (".any())", ".all())"),
    ],
    ("pipeline/storage/kv.py", REQUESTS): [
        ("        requests.WRITES.take(len(items))\n", "        requests.WRITES.take(1)\n"),
    ],
    ("pipeline/storage/targets/encode.py", REQUESTS): [
        ("requests.READS.take(chunk_count(box, array.level.chunk))", "requests.READS.take(1)"),
    ],
    ("pipeline/storage/targets/ome_zarr_target.py", TARGETS): [
        (', {"name": "crc32c"}]', "]"),
        ("centre = [corner + s / 2", "centre = [corner + s"),
        ('"index_location": "end"', '"index_location": "start"'),
    ],
    ("pipeline/storage/targets/precomputed_target.py", TARGETS): [
        ("math.floor(round(corner / size, 6) + 0.5)", "math.floor(corner / size + 0.5)"),
        ("return ZYX(z, y // 2**level, x // 2**level)", "return ZYX(z, -(-y // 2**level), -(-x // 2**level))"),
        ("(start + level.chunk).minimum(level.shape) + offset", "(start + level.chunk) + offset"),
    ],
    ("pipeline/storage/targets/precomputed_shard_files.py", SHARDING): [
        ('future.result().state != "value"', 'future.result().state == "value"'),
        ('struct.pack(">Q"', 'struct.pack("<Q"'),
    ],
    ("pipeline/storage/precomputed_morton.py", SHARDING): [
        ("needed = [(n - 1).bit_length() for n in grid]", "needed = [n.bit_length() for n in grid]"),
        ("for axis in (2, 1, 0)", "for axis in (0, 1, 2)"),
        ("preshift = min(inside, MAX_PRESHIFT_BITS)", "preshift = inside"),
        ("if not all(0 <= c < n for", "if not all(0 <= c <= n for"),
        ("abs(math.log2(a / b))", "abs(a - b)"),
        ("{-(-shard // 4)}x", "{shard // 4}x"),
    ],
    ("pipeline/storage/sources/precomputed_volume.py", SOURCES): [
        ('scale.integers("voxel_offset", 3, low=-MAX_COORDINATE) if', 'scale.integers("voxel_offset", 3) if'),
        (' if "voxel_offset" in scale else [0, 0, 0]', ""),
    ],
    ("pipeline/storage/sources/n5_attributes.py", N5): [
        ("moved[axis] / scale[axis] - 0.5 for", "moved[axis] / scale[axis] for"),
        ('names if transform.values.get("ordering") == "F" else names[::-1]', "names"),
        ("z, y, x = (o * f / s for o, f, s in", "z, y, x = (o / s for o, f, s in"),
        ("if factors is None and min(sizes) < _MIN_NM:", "if False:"),
    ],
    ("pipeline/storage/sources/n5_lz4.py", N5): [
        ('newbyteorder(">")', 'newbyteorder("<")'),
        ("out=most + 1)", "out=most)"),
        ("min(stored - shape) < 0 or", "False or"),
    ],
    ("pipeline/storage/chunk_array.py", JPEG_XL): [
        ("(corner + self.chunk).minimum(shape) - corner", "self.chunk"),
        ("voxels[part.shift(origin).slices(box.start)]", "voxels[part.slices(box.start)]"),
    ],
    ("pipeline/storage/jpeg_xl.py", JPEG_XL): [
        ("lossless=True", "lossless=False"),
        ("(data, out=voxels, numthreads=1)", "(data, numthreads=1)"),
    ],
    ("pipeline/storage/sources/ome_multiscales.py", SOURCES): [
        ("(self.scale[axis] if self.scale else 1) - 0.5 for", "(self.scale[axis] if self.scale else 1) for"),
        ("            translation = [t * v for t, v in zip(translation, values, strict=True)]\n", ""),
        ("for kind, values in [*own, *after]:", "for kind, values in [*after, *own]:"),
        ("if mip >= len(levels):", "if mip > len(levels):"),
    ],
    ("pipeline/storage/files.py", KV): [
        (
            "            left = memoryview(value)\n            while left:",
            "            left = memoryview(value)\n            if left:",
        ),
        ("os.O_CLOEXEC, 0o666)", "os.O_CLOEXEC, 0o600)"),
        ("            if error.errno != errno.EXDEV:\n", "            if True:\n"),
        ("            path.parent.mkdir(parents=True, exist_ok=True)\n", ""),
        ("    except BaseException:\n        path.unlink(missing_ok=True)\n", "    except BaseException:\n"),
        ("if process_identity.has_ended(int(pid), int(began)):", "if True:"),
        ("if at - part.stat().st_mtime > ABANDONED_S:", "if True:"),
    ],
    ("pipeline/storage/swapped_file.py", SWAPPED): [
        ("    if before.generation != generation:\n        return None\n", ""),
        ("if max(_numbers(path), default=0) > number:", "if False:"),
        ("            return os.path.samefile(part, version)\n", "            return False\n"),
        ("        if error.errno not in _NO_LINKS:\n", "        if True:\n"),
        ("copied < number", "False"),
        ('or _members(newest).get("after") == _digest(copy)', ""),
        ("copied > number:", "False:"),
        ("        os.replace(part, path)\n", ""),
        ("        if old < number:", "        if False:"),
    ],
    ("pipeline/storage/process_identity.py", LOCK): [
        ("return fields[0] == _ZOMBIE or int", "return int"),
        (" or int(fields[19]) != began", ""),
        ("(socket.gethostname(), installed,", "(installed,"),
    ],
    ("pipeline/storage/target_lock.py", LOCK): [
        ("            elif seen != first:\n", "            elif False:\n"),
        ("            elif now - began > WATCH_S:\n", "            elif False:\n"),
        ("if self._is_this_write(value):", "if False:"),
        ('        "released": released,', '        "released": False,'),
        ("                    self.lost.set()\n", ""),
        ("                wait = min(RENEW_S, RENEW_AGAIN_S)  # a passing", "                return  # a passing"),
        (" and (own or pid != os.getpid())", ""),
        ('    if lock["released"]:\n        return False\n', ""),
        ('or lock.get("machine") != process_identity.machine():', 'or lock["host"] != socket.gethostname():'),
        ("            if _clock() - self._renewed_at < HOLD_S:\n", "            if True:\n"),
        ("        if self._store.get(FORMER_KEY) is not None:\n            self._store.delete(FORMER_KEY)\n", ""),
        ('lock.get("format", 1) in (1, FORMAT)', "True"),
    ],
    ("pipeline/storage/ledger.py", LOCK): [
        ("            self._hold()\n", ""),
    ],
    ("pipeline/storage/requests.py", REQUESTS): [
        ("max(self._paid, now - 1.0)", "max(self._paid, now)"),
        ("            self._paid = max(self._paid, now - 1.0) +", "            self._paid = self._paid +"),
        ("RequestCounts(refused - self._refused_before, self._retried)", "RequestCounts(refused, self._retried)"),
        ("self._refused_before, self._retried = refused, 0", "self._refused_before = refused"),
    ],
    ("pipeline/plan/requests.py", REQUESTS): [
        ("rate and rate / max(1, workers)", "rate and rate / workers"),
    ],
    ("pipeline/worker/slab.py", WORKER): [
        ("owned.min() == owned.max()", "owned.max() == 0"),
        ("sr[z] = owned[z] = 0", "sr[z] = 0"),
        ("voxels if wanted == list(range(low, high)) else", "voxels if len(wanted) == high - low else"),
        ("absent = 0 if opened.mask is not None or opened.job.source.skip_empty else None", "absent = 0"),
        ("_retrying(opened, lambda: opened.target.put(objects))", "opened.target.put(objects)"),
        (
            "        raise TargetError(error.saw, error.wanted, error.do) from None\n    except DiskError",
            "        raise\n    except DiskError",
        ),
        ("    except DiskError as error:", "    except ZeroDivisionError as error:"),
    ],
    ("pipeline/worker/device_queue.py", "tests/test_device_queue.py"): [
        ("end - max(began, self._ended), end", "end - began, end"),
        ("                before.wait()\n", "                pass\n"),
    ],
    ("pipeline/worker/lease.py", WORKER): [
        ("    requests.limit(job.rates)\n", ""),
        ("if receipts and time.monotonic() >= end:", "if time.monotonic() >= end:"),
        ("for left in range(opened.job.retries, -1, -1):", "for left in range(opened.job.retries - 1, -1, -1):"),
        ("index, kind = start + len(ended),", "index, kind = start,"),
    ],
    ("pipeline/worker/open_job.py", WORKER): [
        ("    refuse_other_emsr(job)\n", ""),
        ("if source.info.fingerprint != job.source_fingerprint:", "if False:"),
        ("_open.job != job:", "_open.job.digest != job.digest:"),
        ("_open.job != job:", "replace(_open.job, run=job.run) != job:"),
        ("_open.job != job:", "replace(_open.job, target=job.target) != job:"),
        ("    job = replace(job, rates=RequestRates(), runtimes=())\n", ""),
        ("            _open = None  # the last one's memory is free before this one takes its own\n", ""),
    ],
    ("pipeline/storage/targets/task_objects.py", WORKER): [
        ("    for key in sorted(objects):\n", "    for key in objects:\n"),
        ("zlib.crc32(objects[key], zlib.crc32(key.encode(), crc))", "zlib.crc32(objects[key], crc)"),
        ("keys + (target.keys(FIDELITY, plan.fidelity_box(slab)) if plan.fidelity is not None else [])", "keys"),
    ],
    ("pipeline/schedule/execute.py", INTERRUPTS): [
        ("    run.interrupted = run.stop.is_set()\n", ""),
        ("while not run.stop.is_set() and (\n", "while (\n"),
    ],
    ("pipeline/schedule/in_flight.py", COPIES): [
        ('"allow_other_workers": named is None', '"allow_other_workers": False'),
    ],
    ("pipeline/worker/fidelity.py", INFERENCE): [
        ("+ area) // (2 * area))", ") // (2 * area))"),
    ],
    ("pipeline/storage/targets/zarr_shard_files.py", TARGETS): [
        ("= size, len(value)", "= len(value), size"),
        ("_ABSENT = 2**64 - 1", "_ABSENT = 0"),
    ],
    ("pipeline/worker/pyramid.py", "tests/test_pyramid.py"): [
        ("            total += 2\n", "            total += 1\n"),
        ('mode="edge"', 'mode="constant"'),
    ],
    ("pipeline/inference/network.py", INFERENCE): [
        (
            "for old in [number for number in cache if number not in numbers]:",
            "for old in [number for number in cache if number not in cache]:",
        ),
    ],
    ("pipeline/inference/describe.py", INFERENCE): [
        ("if halo < traits.min_halo:", "if halo <= traits.min_halo:"),
    ],
    ("pipeline/inference/tiles.py", INFERENCE): [
        ("2 * n - 1 - i)", "2 * n - 2 - i)"),
        ("caches.setdefault((first.y, first.x), {})", "caches.setdefault((first.y, first.y), {})"),
        ("part = cell.lateral(scale).slices(whole", "part = cell.lateral(scale).slices(cell"),
        (
            "place = cell.lateral(scale).slices(self._slab.lr.start.lateral(scale))",
            "place = cell.lateral(scale).slices(self._slab.read.start.lateral(scale))",
        ),
    ],
    ("pipeline/plan/price.py", PRICE): [
        (
            "(-(-(stop - origin) // size) - (start - origin) // size) * size",
            "((stop - origin) // size - (start - origin) // size) * size",
        ),
        ("encoding = lr + sr + first + 2 * largest", "encoding = lr + sr + first + largest"),
        ("(in_flight - 2) * max(waiting, putting)", "(in_flight - 1) * max(waiting, putting)"),
        ("in_flight * 2 * _second_pass_read(plan))", "in_flight * _second_pass_read(plan))"),
        ("stored / (voxels / plan.levels[0].shape.product * output_voxels(plan))", "stored / voxels"),
        ("+ ([plan.fidelity.shape] if plan.fidelity else [])", ""),
    ],
    ("pipeline/plan/price.py", DEVICE_PRICE): [
        ("leased = slabs_per_lease if plan.lattice.window > 1 else 1", "leased = slabs_per_lease"),
        ("plan.section(start - halo), plan.section(stop - 1 + halo)", "start - halo, stop - 1 + halo"),
        (" - (bisect_right(bad, last) - bisect_left(bad, first))", ""),
        ("-(-high * wide // batch) * batch", "high * wide"),
        ("max(read_s, network_s, write_s, (read_s", "max(read_s, network_s, write_s, 0 * (read_s"),
    ],
    ("pipeline/plan/rates.py", DEVICE_PRICE): [
        ("Fit(rate, (tile / rate.tile) ** 2,", "Fit(rate, tile / rate.tile,"),
        ("abs(math.log(r.tile / tile))", "abs(r.tile - tile)"),
        ("(rate.name, rate.preset, rate.scale) ==", "(rate.name, network.preset, rate.scale) =="),
    ],
    ("pipeline/prepare/hours.py", DEVICE_PRICE): [
        ("thread_s = self.in_flight * slab_seconds(", "thread_s = slab_seconds("),
        ("hours.workers * self.price", "hours.device * self.price"),
        ("while longer > leased:", "while not leased:"),
    ],
    ("pipeline/prepare/measured.py", DEVICE_PRICE): [
        ("if cluster.gpus_per_worker == 0", "if not cluster.gpus_per_worker"),
        ("file.read(MAX_MEASURED_BYTES + 1)", "file.read()[:MAX_MEASURED_BYTES]"),
    ],
    ("pipeline/base/waits.py", WATCHDOG): [
        ("        progress.step = replace(progress.step, at=time.monotonic())\n", "        pass\n"),
        ("    progress.step = Step(time.monotonic(), what, extra_s)\n", ""),
    ],
    ("pipeline/base/retry.py", WATCHDOG): [
        ('with waiting("another try after a passing fault", math.inf):', 'with waiting("another try", 0.0):'),
    ],
    ("pipeline/process/watchdog.py", WATCHDOG): [
        ('    with waiting("", math.inf):\n        lock.acquire()\n', "    lock.acquire()\n"),
        ("waited_s > stall_s + step.extra_s", "waited_s > stall_s"),
        ("        if collected:\n            gc.enable()\n", "        pass\n"),
        ("threading.Timer(EXIT_S, os._exit, (STALLED,))", "threading.Timer(EXIT_S, sys.exit, (STALLED,))"),
    ],
    ("pipeline/sections/quality.py", QUALITY): [
        ("empty[start:stop] = stop - start > MAX_FLAT_RUN", "empty[start:stop] = stop - start >= MAX_FLAT_RUN"),
        ("if black[i] - usual_black[i] > MAX_CLIPPED:", "if black[i] > MAX_CLIPPED:"),
        ("elif contrast[i] < FLAT < MIN_CONTRAST * usual[i]:", "elif contrast[i] < FLAT:"),
        ("black=_share(kept, kept <= 0)", "black=_share(kept, kept < 0)"),
        ("np.argmax(surface / overlap)", "np.argmax(surface)"),
        ("* step * (1 if best[0] == i else -1)", "* step"),
        ("and stop - start < LAGS\n", "and stop - start <= LAGS\n"),
        ("place = np.maximum(count - 1, 0) * quantile", "place = count * quantile"),
    ],
    ("models/training/losses.py", LOSSES): [
        ("+ beta * functional.mse_loss(latent, quantised.detach())", "+ beta * functional.mse_loss(latent, quantised)"),
        ("gradient.square().flatten(1).sum(1).mean()", "gradient.square().flatten(1).mean()"),
        ("mean = reference.mean((0, 2, 3), keepdim=True)", "mean = sr.mean((0, 2, 3), keepdim=True)"),
        ("distance.amin(2, keepdim=True)", "distance.amin(1, keepdim=True)"),
        ("+ EPSILON)).max(1)", "+ EPSILON)).max(2)"),
        ("features(sr).repeat_interleave(n, 0)", "features(sr).repeat(n, 1, 1, 1)"),
        ("if place in (5, 10):", "if place in (5, 12):"),
        ("(image - self.mean) / self.std", "image / self.std"),
        ("layers += [conv, nn.ReLU(inplace=True)]", "layers += [conv]"),
    ],
    ("models/training/ahead.py", AHEAD): [
        ("step, drawn = self._drawn.popleft()", "step, drawn = self._drawn.pop()"),
        ("drawn.set_exception(error)", "drawn.set_result(())"),
    ],
    ("models/training/busy.py", AHEAD): [
        ("(until - self._finished[0][0])", "until"),
    ],
    ("models/training/loop.py", AHEAD): [
        ("scale < self._scale", "scale <= self._scale"),
        ('group | {"fused": True, "foreach": None}', "group"),
    ],
    ("pipeline/training/devices.py", PRECISION): [
        ('bool(count) and precision != "float32"', 'precision != "float32"'),
        ("tf32 = all(", "tf32 = any("),
    ],
    ("pipeline/training/run.py", PRECISION): [
        ("taken = kept or devices.choose(gpus)", "taken = devices.choose(gpus)"),
        ('{"precision": EARLIER_WORDS.get(word, word)}', '{"precision": word}'),
    ],
    ("models/vqgan.py", GOLDEN): [
        (
            "x = self.attention(self.head(self.project(channels_last(latent))))",
            "x = self.head(self.attention(self.project(channels_last(latent))))",
        ),
        ("features.insert(0, block(x))", "features.insert(0, x)"),
    ],
    ("models/vqgan.py", LOSSES): [
        ("- 2 * z @ self.weight.T", "- z @ self.weight.T"),
        ("torch.where(quantise, straight_through, latent)", "torch.where(quantise, latent, straight_through)"),
        ("x = functional.relu_(self.input(channels_last(section)))", "x = self.input(channels_last(section))"),
    ],
    ("models/vqgan.py", BANDS): [
        ("features[0], halo=2, peak", "features[0], halo=0, peak"),
    ],
    ("models/mpf.py", GOLDEN): [
        (".mul_(mask)", ""),
        ("pyramid.append(lrelu(up(pyramid[-1])))", "pyramid.append(up(pyramid[-1]))"),
        ("torch.cat([fused, *maps[-1:]], 1)", "torch.cat([*maps[-1:], fused], 1)"),
        (
            "weight = bilinear(mask, 8 / 2**level)",
            "weight = nn.functional.interpolate(mask, scale_factor=8 / 2**level)",
        ),
    ],
    ("models/mpf.py", BANDS): [
        ("halo=4, peak=features.shape[1]", "halo=0, peak=features.shape[1]"),
    ],
    ("models/pod.py", GOLDEN): [
        ("bilinear(coarser[0], 2).mul_(2)", "bilinear(coarser[0], 2)"),
        ("[neighbours[i], centres[i], *flows[i]", "[centres[i], neighbours[i], *flows[i]"),
        ("lrelu(aligned) if i else aligned", "lrelu(aligned)"),
        ("return sections[n // 2 :: n].repeat_interleave(n, 0)", "return sections[::n].repeat_interleave(n, 0)"),
        ("self.flow(enlarged, _of_centre(enlarged, n))", "self.flow(_of_centre(enlarged, n), enlarged)"),
        ("joined(aligned, centre)", "joined(centre, aligned)"),
        ("return lrelu(self.deform(aligned, guide))", "return self.deform(aligned, guide)"),
    ],
    ("pipeline/inference/tiles.py", "tests/test_graphs.py"): [
        ("tiles += tiles[-1:] * (batch - len(tiles))", "tiles += tiles[-1:] * (len(tiles) % batch)"),
    ],
    ("pipeline/inference/graphs.py", "tests/test_graphs.py"): [
        ("mine.copy_(theirs)", "mine.copy_(mine)"),
        ("leaf.copy_(right).add_(1)", "leaf.copy_(right)"),
        ("len(self._graphs) == self._functions", "len(self._graphs) >= 1"),
        ("return pytree.tree_map(torch.clone, graph.result)", "return graph.result"),
    ],
    ("pipeline/selftest/vectors.py", DOCTOR): [
        ("psnr_db >= least", "psnr_db < least"),
        ("difference <= TOLERANCE and not changed", "difference <= TOLERANCE"),
        ("None, None, changed, tolerance, least, may_overflow)", "None, None, changed, tolerance, least, True)"),
    ],
    ("pipeline/selftest/same.py", DOCTOR): [
        ("twice=bool(np.array_equal(once, again))", "twice=True"),
        ("np.array_equal(once[:, :, side:], moved[:, :, :-side])", "once.shape == moved.shape"),
    ],
    ("pipeline/selftest/machine.py", DOCTOR): [
        ('(kind == "compute" or version[0] == capability[0])', 'kind == "compute"'),
        ("version <= capability and", "version >= capability and"),
    ],
}

MUTANTS = [Mutant(file, tests, old, new) for (file, tests), changes in _BY_FILE.items() for old, new in changes]

SURVIVORS_EXPLAINED: dict[str, str] = {
    "if not voxels[tile.slices(box.start)].any()]": (
        "The result is the same: stored chunks that hold a zero are looked up in vain, which costs requests only."
    ),
}
"""The reason why no test can fail with a mutation, by its old text."""
