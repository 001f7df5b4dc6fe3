//! Programs of the real world that use more of the system than their own
//! memory: a database of many processes, a pool of workers, a virtual machine
//! with many threads.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use migrate_core::report::Report;
use migrate_test_hosts::{Host, HostName, Lab, LabGuard, WORKLOAD_V4};
use migrate_tests::field::{Shared, contiguous, grows};
use migrate_tests::hosts::{eventually, listens};
use migrate_tests::migration::moves_in_rounds;
use migrate_tests::require;

/// For whatever a database does at once, on a busy machine.
const SOON: Duration = Duration::from_secs(60);
const DATABASE_PORT: u16 = 5432;
/// Whom the database takes itself for: `nobody`.
const NOBODY: u32 = 65534;

/// Pages of the memory that the database's processes share, a good part of them.
const FILLED_PAGES: u64 = (32 << 20) / 4096;

/// A lab that no other test has.
fn lab(test: &str) -> LabGuard {
    Lab::scoped(&format!("{test}-{}", std::process::id())).unwrap()
}

/// Moves a tree from host1 to host2 in rounds, with every page compared.
fn moves(lab: &Lab, pid: i32) -> Report {
    let options = ["--engine", "uffd", "--max-blackout", "60"];
    moves_in_rounds(lab, pid, (HostName::Host1, HostName::Host2), &options)
}

/// Where Debian puts PostgreSQL's programs, the newest of them.
fn database_programs() -> Option<PathBuf> {
    let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .filter(|path| path.join("postgres").exists())
        .collect();
    versions.sort();
    versions.pop()
}

/// The output of a program of this machine that must succeed.
fn done(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// Starts PostgreSQL on host1, its files where both hosts see them.
///
/// It refuses to be root, and CRIU needs `CAP_SYS_RESOURCE` for a process of
/// another user, which root of a virtual machine may lack. So it is root and
/// takes itself for somebody else.
fn database(host: &Host, programs: &std::path::Path, shared: &Shared) -> i32 {
    let source = shared
        .file(
            "nobody.c",
            "unsigned getuid(void){return 65534;} unsigned geteuid(void){return 65534;}",
        )
        .unwrap();
    let library = shared.text_path("nobody.so");
    done(Command::new("cc").args(["-shared", "-fPIC", "-w", "-o", &library, &source]));
    let data = shared.path("data");
    fs::create_dir(&data).unwrap();
    fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).unwrap();
    chown(&data, Some(NOBODY), Some(NOBODY)).unwrap();
    let data = data.display().to_string();
    done(
        Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(programs.join("initdb"))
            .args(["-D", &data, "-A", "trust", "-N", "-U", "postgres"]),
    );
    let settings = format!(
        "listen_addresses = '{WORKLOAD_V4}'\nunix_socket_directories = ''\n\
         dynamic_shared_memory_type = mmap\nshared_buffers = 64MB\nfsync = off\n"
    );
    let append = |name: &str, text: &str| {
        let path = format!("{data}/{name}");
        let mut file = fs::OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    };
    append("postgresql.conf", &settings);
    append("pg_hba.conf", "host all all 0.0.0.0/0 trust\n");
    let preload = format!("LD_PRELOAD={library}");
    let program = programs.join("postgres").display().to_string();
    // Its lock is a segment of System V memory.
    let argv = ["unshare", "--ipc", "env", &preload, &program, "-D", &data];
    let pid = host.spawn_detached(argv, "/dev/null").unwrap();
    assert!(eventually(SOON, || listens(host, DATABASE_PORT)));
    pid
}

/// A session of `psql`, which is asked and answers line by line.
struct Session {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Session {
    fn open(lab: &Lab, programs: &std::path::Path) -> Self {
        let mut command = lab.host(HostName::Client).command(programs.join("psql"));
        command
            .args(["-h", &WORKLOAD_V4.to_string(), "-U", "postgres"])
            .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            input,
            output,
        }
    }

    fn tell(&mut self, statement: &str) {
        writeln!(self.input, "{statement};").unwrap();
    }

    fn ask(&mut self, statement: &str) -> String {
        self.tell(statement);
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    fn close(mut self) {
        drop(self.input);
        assert!(self.child.wait().unwrap().success());
    }
}

#[test]
fn a_database_moves_within_a_transaction() {
    require!("a_database_moves_within_a_transaction": root, tcx, criu, migrate, cc, setpriv);
    let Some(programs) = database_programs() else {
        println!("SKIP a_database_moves_within_a_transaction: needs postgresql");
        return;
    };
    let lab = lab("database");
    let shared = Shared::new("database").unwrap();
    fs::set_permissions(shared.path("."), fs::Permissions::from_mode(0o755)).unwrap();
    let pid = database(&lab.host(HostName::Host1), &programs, &shared);
    let mut within = Session::open(&lab, &programs);
    within.tell("create table kept (n int); create table counted (n int)");
    within.tell("begin; insert into kept select generate_series(1, 20000)");
    assert_eq!(within.ask("select count(*) from kept"), "20000");
    // Fills most of what the processes share.
    let mut other = Session::open(&lab, &programs);
    other.tell("create table large (t text)");
    other.tell("insert into large select repeat(n::text, 200) from generate_series(1, 50000) n");
    assert_eq!(other.ask("select count(*) from large"), "50000");
    // Another one counts all the while, each number in a transaction of its own.
    let mut counter = Session::open(&lab, &programs);
    let stop = shared.path("stop");
    let counted = std::thread::spawn(move || {
        let mut number = 0u64;
        let deadline = Instant::now() + 4 * SOON;
        while !stop.exists() && Instant::now() < deadline {
            number += 1;
            let insert = format!("insert into counted values ({number}) returning n");
            assert_eq!(counter.ask(&insert), number.to_string());
        }
        counter.close();
        number
    });
    let report = moves(&lab, pid);
    // What they share has gone over in rounds.
    assert!(
        report.pages - report.frozen_pages > FILLED_PAGES,
        "{report:?}"
    );
    assert!(report.frozen_pages < FILLED_PAGES, "{report:?}");
    // Nobody else sees it yet, and it goes on where it was.
    assert_eq!(other.ask("select count(*) from kept"), "0");
    within.tell("insert into kept values (0)");
    assert_eq!(
        within.ask("select count(*), sum(n) from kept"),
        "20001|200010000"
    );
    within.tell("commit");
    within.close();
    assert_eq!(other.ask("select count(*) from kept"), "20001");
    let seen: u64 = other.ask("select count(*) from counted").parse().unwrap();
    // It counts on the destination, too.
    assert!(eventually(SOON, || {
        other
            .ask("select count(*) from counted")
            .parse::<u64>()
            .unwrap()
            > seen + 20
    }));
    fs::write(shared.path("stop"), "").unwrap();
    let number = counted.join().unwrap();
    let all = "select count(*), count(distinct n), max(n) from counted";
    assert_eq!(other.ask(all), format!("{number}|{number}|{number}"));
    other.close();
}

/// Workers forked from one process compute for it, through pipes and shared
/// semaphores; each right sum is a line, and now and then a worker is replaced.
const POOL: &str = "
import multiprocessing, os, sys
def work(n):
    return n, sum(i * i for i in range(n)), os.getpid()
def main():
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    shared = multiprocessing.Value('q', 0)
    count = 0
    with multiprocessing.get_context('fork').Pool(3, maxtasksperchild=40) as pool:
        while True:
            for n, total, pid in pool.imap(work, range(500, 520)):
                with shared.get_lock():
                    shared.value += 1
                count += 1
                right = total == (n - 1) * n * (2 * n - 1) // 6 and shared.value == count
                os.write(log, b'%d\\n' % count if right else b'wrong\\n')
main()
";

#[test]
fn a_pool_of_workers_moves_and_goes_on_computing() {
    require!("a_pool_of_workers_moves_and_goes_on_computing": root, tcx, criu, migrate, python);
    let lab = lab("pool");
    let shared = Shared::new("pool").unwrap();
    let program = shared.file("pool.py", POOL).unwrap();
    let log = shared.text_path("log");
    let argv = ["/usr/bin/python3", &program, &log];
    let source = lab.host(HostName::Host1);
    let pid = source.spawn_detached(argv, "/dev/null").unwrap();
    let log = shared.path("log");
    assert!(grows(&log, 100));
    moves(&lab, pid);
    assert!(grows(&log, 300), "{}", shared.read("log"));
    contiguous(&shared.read("log"));
}

/// Threads that hand numbers on in a ring, each keeps and checks its own sums
/// and makes garbage; each number that has gone round is a line.
const RING: &str = r#"
import java.io.FileOutputStream;
import java.util.*;
import java.util.concurrent.*;
public class Ring {
    public static void main(String[] arguments) throws Exception {
        int threads = 24;
        List<BlockingQueue<Long>> queues = new ArrayList<>();
        for (int i = 0; i <= threads; i++) queues.add(new ArrayBlockingQueue<>(8));
        ConcurrentHashMap<Long, byte[]> kept = new ConcurrentHashMap<>();
        for (int i = 0; i < threads; i++) {
            BlockingQueue<Long> from = queues.get(i), to = queues.get(i + 1);
            Thread thread = new Thread(() -> {
                long sum = 0;
                try {
                    for (long n = 1; ; n++) {
                        long taken = from.take();
                        sum += taken;
                        byte[] garbage = new byte[1000 + (int) (taken % 5000)];
                        Arrays.fill(garbage, (byte) taken);
                        kept.put(taken % 4000, garbage);
                        boolean right = taken == n && sum == n * (n + 1) / 2;
                        to.put(right ? taken : -1L);
                    }
                } catch (InterruptedException e) { throw new RuntimeException(e); }
            });
            thread.setDaemon(true);
            thread.start();
        }
        try (FileOutputStream log = new FileOutputStream(arguments[0], true)) {
            for (long n = 1; ; n++) {
                queues.get(0).put(n);
                long back = queues.get(threads).take();
                byte[] held = kept.get(n % 4000);
                boolean right = back == n && held[held.length - 1] == (byte) n;
                log.write((right ? n + "\n" : "wrong\n").getBytes());
                Thread.sleep(1);
            }
        }
    }
}
"#;

#[test]
fn a_java_program_moves_with_its_threads() {
    require!("a_java_program_moves_with_its_threads": root, tcx, criu, migrate, java);
    let lab = lab("java");
    let shared = Shared::new("java").unwrap();
    let program = shared.file("Ring.java", RING).unwrap();
    let log = shared.text_path("log");
    // What `jps` shows would be a file in memory that stays here.
    let argv = [
        "java",
        "-XX:+PerfDisableSharedMem",
        "-Xmx96m",
        &program,
        &log,
    ];
    let source = lab.host(HostName::Host1);
    let pid = source.spawn_detached(argv, "/dev/null").unwrap();
    let log = shared.path("log");
    assert!(eventually(SOON, || log.exists()), "java does not start");
    assert!(grows(&log, 200));
    moves(&lab, pid);
    assert!(grows(&log, 300), "{}", shared.read("log"));
    contiguous(&shared.read("log"));
}
