//! Memory that a tree shares moves in rounds, whoever writes to it and however:
//! anonymous, System V and memfd segments, through mappings that come and go,
//! by processes that come and go, and by `write(2)`.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::path::Path;
use std::time::Duration;

use migrate_core::report::Report;
use migrate_test_hosts::{Host, HostName, Lab, LabGuard};
use migrate_tests::field::{Shared, contiguous, grows};
use migrate_tests::hosts::eventually;
use migrate_tests::migration::moves_in_rounds;
use migrate_tests::require;

/// For what a program does at once, on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// A lab that no other test has.
fn lab(test: &str) -> LabGuard {
    Lab::scoped(&format!("{test}-{}", std::process::id())).unwrap()
}

/// Moves a tree from one host to the other in rounds, with every page compared.
fn moves(lab: &Lab, pid: i32, from: HostName, to: HostName, engine: &str) -> Report {
    let engine = ["--engine", engine, "--max-blackout", "120"];
    let rounds = ["--max-iterations", "3", "--goal", "100"];
    moves_in_rounds(lab, pid, (from, to), &[engine, rounds].concat())
}

/// A parent and three children write at random to segments of every kind and
/// check, before each write, that the page is what was written last. Children
/// are replaced all the while, each hands over what it knows of its pages. A
/// line of the log is a number of steps without a mistake.
const CHURN: &str = r#"
import ctypes, hashlib, mmap, os, pickle, random, sys
PAGE = 4096
seed, log_path = int(sys.argv[1]), sys.argv[2]
log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
dice = random.Random(seed)
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
def system_v(pages):
    # Its size ends within a page.
    size = pages * PAGE - 1000
    number = libc.shmget(0, ctypes.c_size_t(size), 0o1600)
    at = libc.shmat(number, None, 0)
    assert at not in (None, 2**64 - 1), ctypes.get_errno()
    return memoryview((ctypes.c_char * (pages * PAGE)).from_address(at)).cast('B')
def memfd(pages):
    fd = os.memfd_create('churn')
    os.ftruncate(fd, pages * PAGE)
    return fd
SLOTS, PAGES = 3, 96
shared_fd = memfd(PAGES)
segments = {
    'anonymous': mmap.mmap(-1, PAGES * PAGE),
    'system v': system_v(PAGES),
    'memfd': mmap.mmap(shared_fd, PAGES * PAGE),
}
# The same file once more: what one mapping writes, the other shows.
twin = mmap.mmap(shared_fd, PAGES * PAGE, prot=mmap.PROT_READ)
untouched = mmap.mmap(-1, 64 * PAGE)
def pattern(number):
    return hashlib.blake2b(b'%d %d' % (seed, number), digest_size=32).digest() * (PAGE // 32)
def page_of(view, page):
    return bytes(view[page * PAGE:(page + 1) * PAGE])
def fail(what):
    os.write(log, ('wrong: %s\n' % what).encode())
    os._exit(1)
def check(view, page, number, what):
    expected = pattern(number) if number else bytes(PAGE)
    if page_of(view, page) != expected:
        fail('%s page %d' % (what, page))
def child(slot, model, count, pipe, dice):
    for step in range(200 + dice.randrange(200)):
        name = dice.choice(list(segments))
        page = dice.randrange(PAGES // SLOTS) * SLOTS + slot
        view = segments[name]
        check(view, page, model.get((name, page), 0), name)
        if name == 'memfd':
            check(twin, page, model.get((name, page), 0), 'twin')
        count += 1
        number = count * SLOTS + slot
        if name == 'memfd' and dice.randrange(3) == 0:
            os.pwrite(shared_fd, pattern(number), page * PAGE)
        else:
            view[page * PAGE:(page + 1) * PAGE] = pattern(number)
        model[(name, page)] = number
    for (name, page), number in model.items():
        check(segments[name], page, number, name)
    with os.fdopen(pipe, 'wb') as out:
        pickle.dump((model, count), out)
    os._exit(0)
models = {slot: ({}, 0) for slot in range(SLOTS)}
children = {}
def start(slot):
    back, there = os.pipe()
    their = random.Random(dice.randrange(1 << 60))
    pid = os.fork()
    if pid == 0:
        os.close(back)
        child(slot, *models[slot], there, their)
    os.close(there)
    children[slot] = (pid, back)
# Grows and shrinks, and is written without a mapping; and segments that come and go.
elastic, elastic_model, elastic_pages = memfd(16), {}, 16
window = mmap.mmap(elastic, 16 * PAGE)
passing, number, lines = [], 10**9, 0
for slot in range(SLOTS):
    start(slot)
while True:
    for slot in range(SLOTS):
        pid, back = children[slot]
        with os.fdopen(back, 'rb') as into:
            data = into.read()
        if os.waitpid(pid, 0)[1] != 0 or not data:
            fail('child %d' % slot)
        models[slot] = pickle.loads(data)
        start(slot)
    for step in range(20):
        number += 1
        page = dice.randrange(elastic_pages)
        at = os.pread(elastic, PAGE, page * PAGE)
        if at != (pattern(elastic_model[page]) if page in elastic_model else bytes(PAGE)):
            fail('elastic page %d of %d' % (page, elastic_pages))
        if page < 16 and dice.randrange(2):
            window[page * PAGE:(page + 1) * PAGE] = pattern(number)
        else:
            os.pwrite(elastic, pattern(number), page * PAGE)
        elastic_model[page] = number
    elastic_pages = 16 + dice.randrange(64)
    os.ftruncate(elastic, elastic_pages * PAGE)
    elastic_model = {page: n for page, n in elastic_model.items() if page < elastic_pages}
    if len(passing) > 4:
        for view, page, n in passing.pop(0):
            check(view, page, n, 'passing')
    view, pages = mmap.mmap(-1, 32 * PAGE), []
    for page in sorted(dice.sample(range(32), 6)):
        number += 1
        view[page * PAGE:(page + 1) * PAGE] = pattern(number)
        pages.append((view, page, number))
    passing.append(pages)
    for kept in passing:
        for view, page, n in kept:
            check(view, page, n, 'passing')
    if dice.randrange(8) == 0 and any(page_of(untouched, page) != bytes(PAGE) for page in range(64)):
        fail('untouched')
    lines += 1
    os.write(log, b'%d\n' % lines)
"#;

/// Starts a Python program in an IPC namespace of its own.
fn start(host: &Host, program: &str, arguments: &[&str], log: &Path) -> i32 {
    let argv = ["unshare", "--ipc", "/usr/bin/python3", program];
    let argv = [&argv[..], arguments].concat();
    let pid = host.spawn_detached(argv, "/dev/null").unwrap();
    assert!(eventually(SOON, || log.exists()), "it does not start");
    pid
}

/// Moves the churn there and back, with this seed.
fn churns(name: &str, seed: u64, engine: &str) {
    let lab = lab(name);
    let shared = Shared::new(name).unwrap();
    let program = shared.file("churn.py", CHURN).unwrap();
    let (log, seed) = (shared.path("log"), seed.to_string());
    let arguments = [&*seed, &shared.text_path("log")];
    let pid = start(&lab.host(HostName::Host1), &program, &arguments, &log);
    assert!(grows(&log, 3), "{}", shared.read("log"));
    for (from, to) in [
        (HostName::Host1, HostName::Host2),
        (HostName::Host2, HostName::Host1),
    ] {
        moves(&lab, pid, from, to, engine);
        assert!(grows(&log, 6), "seed {seed}: {}", shared.read("log"));
    }
    contiguous(&shared.read("log"));
}

#[test]
fn whoever_writes_to_shared_memory_finds_it_as_it_was() {
    require!("whoever_writes_to_shared_memory_finds_it_as_it_was": root, tcx, criu, migrate, python);
    for seed in 1..=3 {
        churns("churn", seed, "uffd");
    }
}

#[test]
fn so_it_is_where_memory_is_compared() {
    require!("so_it_is_where_memory_is_compared": root, tcx, criu, migrate, python);
    churns("compared", 11, "full");
}

/// Fills 64 MiB that two processes share, and writes to one page after another.
const LARGE: &str = r"
import mmap, os, sys, time
SIZE = 64 << 20
view = mmap.mmap(-1, SIZE)
for at in range(0, SIZE, 1 << 20):
    view[at:at + (1 << 20)] = os.urandom(1 << 20)
parent = os.fork() > 0
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
count = 0
while True:
    count += 1
    at = (count * 2 + parent) % 512 * 4096
    view[at:at + 8] = count.to_bytes(8, 'little')
    if int.from_bytes(view[at:at + 8], 'little') != count:
        os.write(log, b'wrong\n')
    if parent:
        os.write(log, b'%d\n' % count)
    time.sleep(0.01)
";

#[test]
fn what_is_shared_has_gone_over_before_the_freeze() {
    require!("what_is_shared_has_gone_over_before_the_freeze": root, tcx, criu, migrate, python);
    const PAGES: u64 = (64 << 20) / 4096;
    for engine in ["uffd", "full"] {
        let lab = lab("large");
        let shared = Shared::new("large").unwrap();
        let program = shared.file("large.py", LARGE).unwrap();
        let (log, text) = (shared.path("log"), shared.text_path("log"));
        let pid = start(&lab.host(HostName::Host1), &program, &[&text], &log);
        assert!(grows(&log, 20));
        let report = moves(&lab, pid, HostName::Host1, HostName::Host2, engine);
        // It went in rounds, and the frozen tree sent what is written all the
        // time: at most 512 pages, and what private memory there is.
        assert!(
            report.pages - report.frozen_pages >= PAGES,
            "{engine}: {report:?}"
        );
        assert!(report.frozen_pages < PAGES / 2, "{engine}: {report:?}");
        assert!(grows(&log, 50));
        contiguous(&shared.read("log"));
    }
}
