//! `vm run KERNEL [--] CMD... | bench KERNEL [--] OPTIONS... | up | exec NAME [--] CMD...`

use std::ffi::OsString;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand};
use migrate_test_hosts::HostName;
use migrate_test_vms::{Kernel, Machine, Machines, Order, Program, scratch};

use crate::program;

/// What goes into the guests besides Debian's programs, when it is built.
const PROGRAMS: [&str; 4] = ["migrate", "echo-server", "strict-client", "lazy-memory"];

/// What the benchmark consists of.
pub(crate) const BENCH_PACKAGES: [&str; 3] = ["migrate-cli", "migrate-tests", "migrate-bench"];

/// The programs of it.
const BENCH_PROGRAMS: [&str; 4] = ["migrate", "migrate-bench", "echo-server", "strict-client"];

/// What its test hosts need besides what every guest has.
const KEY_GENERATOR: &str = "/usr/bin/ssh-keygen";

/// For a step of what prepares it.
const BENCH_STEP_LIMIT: Duration = Duration::from_secs(60);

/// Where it lives in the guest: test hosts link to their programs from the places where
/// the guest has them.
const BENCH_HOME: &str = "/bench";

#[derive(Args)]
pub(crate) struct Which {
    /// Which set of machines; several can be up side by side.
    #[arg(long, value_name = "NAME", default_value = "demo")]
    set: String,
}

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Fetch the kernels and show them.
    Kernels,
    /// Boot one machine, run a command in it, and end with its exit status.
    Run {
        /// 6.1, 6.12 or newest.
        #[arg(value_name = "KERNEL")]
        kernel: Kernel,
        /// Its memory.
        #[arg(long, value_name = "MIB", default_value_t = 768)]
        memory_mib: u32,
        /// Put a program that was built here on root's path. May be given several times.
        #[arg(long, value_name = "FILE")]
        program: Vec<PathBuf>,
        /// The command and its arguments.
        #[arg(value_name = "CMD", required = true, trailing_var_arg = true)]
        #[arg(allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Boot one machine and make `cargo xtask bench` in it, on a kernel that this machine may not
    /// have. Its times are those of an emulator: read the ratios.
    Bench {
        /// 6.1, 6.12 or newest.
        #[arg(value_name = "KERNEL")]
        kernel: Kernel,
        /// Its memory.
        #[arg(long, value_name = "MIB", default_value_t = 3072)]
        memory_mib: u32,
        /// Where results are kept; a run that is there is not made again.
        #[arg(long, value_name = "DIR", default_value = "target/bench-vm")]
        results: PathBuf,
        /// What `cargo xtask bench` takes, but for --results and --docs.
        #[arg(
            value_name = "OPTIONS",
            trailing_var_arg = true,
            allow_hyphen_values = true
        )]
        options: Vec<OsString>,
    },
    /// Boot host1, host2 and client, and keep them up until standard input ends or Ctrl-C.
    Up {
        #[command(flatten)]
        which: Which,
        /// The kernel of host1.
        #[arg(long, value_name = "KERNEL", default_value_t = Kernel::V6_1)]
        host1: Kernel,
        /// The kernel of host2.
        #[arg(long, value_name = "KERNEL", default_value_t = Kernel::V6_12)]
        host2: Kernel,
        /// The kernel of client.
        #[arg(long, value_name = "KERNEL", default_value_t = Kernel::V6_12)]
        client: Kernel,
    },
    /// Run a command in a machine of a set that is up.
    Exec {
        #[command(flatten)]
        which: Which,
        /// host1, host2 or client.
        #[arg(value_name = "NAME")]
        host: String,
        /// The command and its arguments.
        #[arg(value_name = "CMD", required = true, trailing_var_arg = true)]
        #[arg(allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

pub(crate) fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Kernels => {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/vms");
            let error = Command::new(&script).exec();
            Err(error).with_context(|| format!("could not run {}", script.display()))
        }
        Verb::Run {
            kernel,
            memory_mib,
            program,
            command,
        } => {
            let mut programs = built()?;
            for path in program {
                let name = path.file_name().context("a program has no name")?;
                let name = name.to_string_lossy().into_owned();
                programs.push(Program { path, name });
            }
            let order = Order {
                memory_mib,
                ..Order::new(HostName::Host1, kernel)
            };
            run_one(order, &programs, &command)
        }
        Verb::Bench {
            kernel,
            memory_mib,
            results,
            options,
        } => {
            for own in ["--results", "--docs"] {
                let told = options.iter().any(|option| {
                    let option = option.to_string_lossy();
                    option == own || option.starts_with(&format!("{own}="))
                });
                ensure!(
                    !told,
                    "{own} is not for the benchmark in the machine: --results DIR goes before {kernel}, \
                     and `cargo xtask bench --show --results DIR --docs DIR` writes docs afterwards",
                    kernel = kernel.series()
                );
            }
            let directory = program::build(&BENCH_PACKAGES)?;
            let from = |path: PathBuf, name: &str| Program {
                path,
                name: name.to_owned(),
            };
            let mut programs = BENCH_PROGRAMS
                .map(|name| from(directory.join(name), name))
                .to_vec();
            programs.push(from(KEY_GENERATOR.into(), "ssh-keygen"));
            let order = Order {
                memory_mib,
                ..Order::new(HostName::Host1, kernel)
            };
            bench(order, &programs, &results, &options)
        }
        Verb::Up {
            which,
            host1,
            host2,
            client,
        } => {
            let dir = directory(&which)?;
            fs::DirBuilder::new()
                .mode(0o700)
                .recursive(true)
                .create(dir.parent().unwrap_or(&dir))?;
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&dir)
                .with_context(|| format!("is the set up? If not, remove {}", dir.display()))?;
            let orders = [
                Order::new(HostName::Host1, host1),
                Order::new(HostName::Host2, host2),
                Order::new(HostName::Client, client),
            ];
            let outcome = stay_up(&dir, &orders);
            // The first failure is the one to tell.
            let _ = fs::remove_dir_all(&dir);
            outcome
        }
        Verb::Exec {
            which,
            host,
            command,
        } => {
            let host = host.parse::<HostName>()?;
            let (program, arguments) = command.split_first().context("no command is given")?;
            let prefix = directory(&which)?.join(host.as_str());
            let error = Machine::command_at(&prefix, program).args(arguments).exec();
            Err(error).with_context(|| format!("could not enter {host}"))
        }
    }
}

fn run_one(order: Order, programs: &[Program], command: &[OsString]) -> anyhow::Result<()> {
    let dir = scratch()?;
    let machines = Machines::boot(dir.path(), &[order], programs)?;
    let machine = machines.get(order.host).context("it is not there")?;
    let (program, arguments) = command.split_first().context("no command is given")?;
    let status = machine
        .command(program)
        .args(arguments)
        .stdin(Stdio::inherit())
        .status()?;
    ensure!(
        machine.verdict().is_none(),
        "{}",
        machine.verdict().unwrap_or_default()
    );
    drop(machines);
    drop(dir);
    std::process::exit(status.code().unwrap_or(125))
}

/// Makes the benchmark in a guest; what is there of it goes in, and all of it comes out.
fn bench(
    order: Order,
    programs: &[Program],
    results: &Path,
    options: &[OsString],
) -> anyhow::Result<()> {
    fs::create_dir_all(results).with_context(|| format!("make {}", results.display()))?;
    let dir = scratch()?;
    let machines = Machines::boot(dir.path(), &[order], programs)?;
    let machine = machines.get(order.host).context("it is not there")?;
    let inside = format!("{BENCH_HOME}/results");
    let moved = format!(
        "mkdir -p {inside}; cd /usr/local/sbin && mv {} {BENCH_HOME}",
        BENCH_PROGRAMS.join(" ")
    );
    machine.succeed(["sh", "-c", &moved], BENCH_STEP_LIMIT)?;
    for entry in fs::read_dir(results)? {
        let entry = entry?;
        let name = entry.file_name();
        machine.put(
            &entry.path(),
            &format!("{inside}/{}", name.display()),
            0o644,
        )?;
    }
    let status = machine
        .command(format!("{BENCH_HOME}/migrate-bench"))
        .args(options)
        .args(["--results", &inside])
        .stdin(Stdio::null())
        .status()?;
    let files = machine.succeed(["ls", &inside], BENCH_STEP_LIMIT)?;
    for name in files.lines() {
        let text = machine.read(&format!("{inside}/{name}"))?;
        let to = results.join(name);
        fs::write(&to, text).with_context(|| format!("write {}", to.display()))?;
    }
    ensure!(status.success(), "the benchmark ended with {status}");
    Ok(())
}

fn stay_up(dir: &Path, orders: &[Order]) -> anyhow::Result<()> {
    let machines = Machines::boot(dir, orders, &built()?)?;
    for machine in machines.iter() {
        println!("{:<8} {}", machine.host(), machine.kernel());
    }
    println!("in them: cargo xtask vm exec NAME -- CMD...; end of input takes them down");
    let mut input = Vec::new();
    // However it ends, so do the machines.
    let _ = std::io::stdin().read_to_end(&mut input);
    Ok(())
}

/// Where the sockets of a set are: short enough for their names.
fn directory(which: &Which) -> anyhow::Result<PathBuf> {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        (1..=32).contains(&which.set.len()) && which.set.chars().all(is_plain),
        "`{}` cannot name a set: use 1 to 32 of the characters a-z, 0-9 and `-`",
        which.set
    );
    Ok(Path::new("/run/migrate-vms").join(&which.set))
}

/// The programs that are beside this one.
fn built() -> anyhow::Result<Vec<Program>> {
    let this = std::env::current_exe().context("could not find this executable")?;
    let directory = this.parent().context("this executable has no directory")?;
    Ok(PROGRAMS
        .iter()
        .map(|name| Program {
            path: directory.join(name),
            name: (*name).to_owned(),
        })
        .filter(|program| program.path.is_file())
        .collect())
}
