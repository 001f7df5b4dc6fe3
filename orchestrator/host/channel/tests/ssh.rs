//! The way through SSH, with a real sshd on loopback and this very program as
//! the agent behind it. Needs root, as sshd does.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests, where a panic is the verdict"
)]

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Read as _},
    net::TcpListener,
    os::unix::{fs::PermissionsExt as _, process::parent_id},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use migrate_channel::{ChannelError, Connection, Destination, Frame, connect, serve_stdio};
use migrate_core::wire::{
    Hello, Message, PAGE_BYTES, PROTOCOL_VERSION, PageOwner, PageRun, RunningReport,
};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(20);
const SSHD: &str = "/usr/sbin/sshd";
const AGENT_VARIABLE: &str = "CHANNEL_TEST_AGENT_RELEASE";

/// What stands for `migrate` on the other host: this program as an agent of release `t`.
const AGENT: &str =
    "exec env CHANNEL_TEST_AGENT_RELEASE=t \"$EXE\" --exact remote_agent --nocapture";

macro_rules! sshd_or_skip {
    ($agent:expr) => {
        sshd_or_skip!($agent, "127.0.0.1")
    };
    ($agent:expr, $address:expr) => {
        match Sshd::start($agent, $address) {
            Ok(sshd) => sshd,
            Err(reason) => {
                println!("SKIP sshd: {reason}");
                return;
            }
        }
    };
}

fn hello(release: &str, hostname: &str, migration_id: &str) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        release: release.into(),
        hostname: hostname.into(),
        migration_id: migration_id.into(),
    }
}

/// An sshd of one test, with keys, known hosts and a `migrate` of its own.
struct Sshd {
    child: Child,
    directory: TempDir,
    address: &'static str,
    port: u16,
}

impl Sshd {
    /// `agent` is the shell script that is `migrate` there; none if empty.
    fn start(agent: &str, address: &'static str) -> Result<Self, String> {
        if !Path::new(SSHD).exists() {
            return Err(format!("{SSHD} not found"));
        }
        if !is_root() {
            return Err("not root".into());
        }
        if let Err(error) = TcpListener::bind((address, 0)) {
            return Err(format!("no {address} here: {error}"));
        }
        fs::create_dir_all("/run/sshd").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["host", "other-host", "user", "other-user"] {
            keygen(&path(name));
        }
        fs::copy(path("user.pub"), path("authorized")).unwrap();
        let bin = path("bin");
        fs::create_dir(&bin).unwrap();
        if !agent.is_empty() {
            let exe = std::env::current_exe().unwrap();
            let script = format!(
                "#!/bin/sh\n[ \"$*\" = 'agent --stdio' ] || exit 64\nEXE='{}'\nDIR='{}'\nexport DIR\n{agent}\n",
                exe.display(),
                directory.path().display()
            );
            let migrate = bin.join("migrate");
            fs::write(&migrate, script).unwrap();
            fs::set_permissions(&migrate, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let port = free_port();
        fs::write(
            path("config"),
            format!(
                "Port {port}\nListenAddress {address}\nHostKey {}\nAuthorizedKeysFile {}\n\
                 StrictModes no\nUsePAM no\nPasswordAuthentication no\n\
                 KbdInteractiveAuthentication no\nPermitRootLogin yes\nPidFile none\n\
                 SetEnv PATH={}:/usr/bin:/bin\n",
                path("host").display(),
                path("authorized").display(),
                bin.display()
            ),
        )
        .unwrap();
        let known = |name: &str| {
            let key = fs::read_to_string(path(&format!("{name}.pub"))).unwrap();
            format!("[{address}]:{port} {key}")
        };
        fs::write(path("known"), known("host")).unwrap();
        fs::write(path("known-other"), known("other-host")).unwrap();
        fs::write(path("known-none"), "").unwrap();
        let mut child = Command::new(SSHD)
            .args(["-D", "-e", "-f"])
            .arg(path("config"))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("Server listening") {
            line.clear();
            if said.read_line(&mut line).unwrap() == 0 {
                return Err(format!("ended at once with {}", child.wait().unwrap()));
            }
        }
        thread::spawn(move || io::copy(&mut said, &mut io::sink()));
        Ok(Self {
            child,
            directory,
            address,
            port,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn destination_with(&self, user_key: &str, known_hosts: &str) -> Destination {
        let Destination::Ssh { user, host, .. } =
            Destination::parse(&format!("root@{}", self.address), None).unwrap()
        else {
            panic!("no SSH destination");
        };
        Destination::Ssh {
            user,
            host,
            options: vec![
                format!("Port={}", self.port),
                format!("IdentityFile={}", self.path(user_key).display()),
                "IdentitiesOnly=yes".into(),
                format!("UserKnownHostsFile={}", self.path(known_hosts).display()),
                "GlobalKnownHostsFile=/dev/null".into(),
            ],
        }
    }

    async fn connect(&self) -> Result<Connection, ChannelError> {
        let destination = self.destination_with("user", "known");
        connect(&destination, hello("t", "host1", "m1"), SOON).await
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        // A test that failed has said so already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}

fn keygen(path: &Path) {
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(path)
        .status()
        .unwrap();
    assert!(made.success());
}

fn free_port() -> u16 {
    let probe = TcpListener::bind("127.0.0.1:0").unwrap();
    probe.local_addr().unwrap().port()
}

/// The agent, when another test has started it behind sshd: answers every
/// message with its parent's PID and the pages so far.
#[tokio::test]
async fn remote_agent() {
    let Ok(release) = std::env::var(AGENT_VARIABLE) else {
        return;
    };
    let mut connection = serve_stdio(hello(&release, "host2", "")).await.unwrap();
    let mut stdin = Vec::new();
    io::stdin().read_to_end(&mut stdin).ok();
    println!("standard output leads to nowhere now");
    let mut pages = 0;
    loop {
        match connection.receiver.next(SOON).await {
            Ok(Frame::Pages { run, data }) => {
                assert_eq!(data.len() as u64, run.pages * PAGE_BYTES as u64);
                pages += run.pages;
            }
            Ok(Frame::Control(_)) => {
                let report = RunningReport {
                    root_pid: i32::try_from(parent_id()).unwrap(),
                    takeover_us: pages,
                    ..RunningReport::default()
                };
                let answer = Message::Running(report);
                connection.sender.control(&answer).await.unwrap();
            }
            Ok(Frame::Image { .. } | Frame::Packet(_)) => panic!("only pages here"),
            Err(end) => {
                let how = format!("{end} for {}", connection.hello.migration_id);
                let directory = std::env::var("DIR").unwrap();
                fs::write(Path::new(&directory).join("ended"), how).unwrap();
                return;
            }
        }
    }
}

async fn ask(connection: &mut Connection) -> RunningReport {
    connection.sender.control(&Message::Prepared).await.unwrap();
    match connection.receiver.control(SOON).await.unwrap() {
        Message::Running(report) => report,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_agent_is_started_by_ssh_and_outlives_it() {
    let sshd = sshd_or_skip!(AGENT);
    let mut connection = sshd.connect().await.unwrap();
    assert_eq!(connection.peer.hostname, "host2");
    assert_eq!(connection.hello.migration_id, "m1");
    assert_ne!(connection.peer_addr.port(), sshd.port);
    let run = PageRun {
        owner: PageOwner::Task(1),
        vaddr: 0,
        pages: 2000,
        flags: PageRun::PRESENT,
    };
    let data = vec![1; 2000 * PAGE_BYTES];
    connection.sender.pages(&run, &data).await.unwrap();
    let with_ssh = ask(&mut connection).await;
    assert_eq!(with_ssh.takeover_us, 2000);

    connection.ssh = None;
    let begun = Instant::now();
    while ask(&mut connection).await.root_pid == with_ssh.root_pid {
        assert!(begun.elapsed() < SOON, "sshd's session did not end");
    }
    connection.sender.pages(&run, &data).await.unwrap();
    assert_eq!(ask(&mut connection).await.takeover_us, 4000);

    connection.sender.close().await.unwrap();
    let end = connection.receiver.next(SOON).await.unwrap_err();
    assert!(end.is_disconnect(), "{end}");
    let how = fs::read_to_string(sshd.path("ended")).unwrap();
    assert!(how.contains("closed the connection for m1"), "{how}");
}

#[tokio::test]
async fn the_agent_listens_on_the_address_that_ssh_came_to() {
    let sshd = sshd_or_skip!(AGENT, "::1");
    let mut connection = sshd.connect().await.unwrap();
    assert_eq!(connection.peer_addr.ip().to_string(), "::1");
    ask(&mut connection).await;
}

#[tokio::test]
async fn what_a_login_prints_is_passed_over_up_to_a_bound() {
    let sshd = sshd_or_skip!(&format!("echo Welcome; printf 'no newline'; {AGENT}"));
    ask(&mut sshd.connect().await.unwrap()).await;
    let sshd = sshd_or_skip!("yes Welcome");
    let error = sshd.connect().await.unwrap_err();
    assert!(
        matches!(error, ChannelError::TooMuchOutput { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn host_keys_and_logins_are_told_apart() {
    let sshd = sshd_or_skip!(AGENT);
    let attempt = async |user_key, known_hosts| {
        let destination = sshd.destination_with(user_key, known_hosts);
        connect(&destination, hello("t", "host1", "m1"), SOON)
            .await
            .unwrap_err()
    };
    let error = attempt("user", "known-none").await;
    assert!(
        matches!(error, ChannelError::HostKeyUnknown { .. }),
        "{error}"
    );
    let error = attempt("user", "known-other").await;
    assert!(
        matches!(error, ChannelError::HostKeyChanged { .. }),
        "{error}"
    );
    let error = attempt("other-user", "known").await;
    assert!(
        matches!(error, ChannelError::PermissionDenied { .. }),
        "{error}"
    );
    assert!(error.help().unwrap().contains("root@127.0.0.1"));
}

#[tokio::test]
async fn a_host_without_migrate_is_named() {
    let sshd = sshd_or_skip!("");
    let error = sshd.connect().await.unwrap_err();
    assert!(
        matches!(error, ChannelError::NotInstalled { .. }),
        "{error}"
    );
    assert!(error.help().unwrap().contains("MIGRATE_REMOTE_COMMAND"));
}

#[tokio::test]
async fn an_agent_of_another_release_is_named() {
    let sshd = sshd_or_skip!(&AGENT.replace("RELEASE=t", "RELEASE=9.9"));
    let error = sshd.connect().await.unwrap_err();
    assert!(matches!(error, ChannelError::Version { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("release 9.9") && text.contains("release t"),
        "{text}"
    );
}

#[tokio::test]
async fn an_agent_that_ends_at_once_is_quoted() {
    let sshd = sshd_or_skip!("echo 'criu: too old' >&2; exit 3");
    let error = sshd.connect().await.unwrap_err();
    assert!(matches!(error, ChannelError::AgentEnded { .. }), "{error}");
    assert!(error.to_string().contains("criu: too old"), "{error}");
}

#[tokio::test]
async fn an_agent_that_cannot_serve_says_why() {
    let sshd = sshd_or_skip!(&format!("SSH_CONNECTION=; export SSH_CONNECTION; {AGENT}"));
    let error = sshd.connect().await.unwrap_err();
    assert!(
        matches!(error, ChannelError::AgentRefused { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("SSH_CONNECTION"), "{error}");
    assert!(error.help().is_some());
}

#[tokio::test]
async fn an_agent_that_says_nothing_meets_the_deadline() {
    let sshd = sshd_or_skip!("echo 'still loading' >&2; exec cat >/dev/null");
    let destination = sshd.destination_with("user", "known");
    // Enough for a login beside those of all other tests.
    let limit = Duration::from_secs(8);
    let begun = Instant::now();
    let error = connect(&destination, hello("t", "host1", "m1"), limit)
        .await
        .unwrap_err();
    assert!(error.is_deadline(), "{error}");
    assert!(error.to_string().contains("the agent's answer"), "{error}");
    assert!(error.to_string().contains("still loading"), "{error}");
    assert!(begun.elapsed() < 2 * limit);
}

#[tokio::test]
async fn a_blocked_direct_connection_is_named_with_its_port() {
    let port = free_port();
    let line = format!(
        r#"{{"migrate_agent":1,"protocol":{PROTOCOL_VERSION},"release":"t","addresses":["127.0.0.1:{port}"],"certificate":"00"}}"#
    );
    let sshd = sshd_or_skip!(&format!("echo '{line}'; exec cat >/dev/null"));
    let error = sshd.connect().await.unwrap_err();
    assert!(
        matches!(error, ChannelError::DirectUnreachable { .. }),
        "{error}"
    );
    assert!(error.to_string().contains(&format!("127.0.0.1:{port}")));
    assert!(error.help().unwrap().contains("firewall"));
}

#[tokio::test]
async fn a_host_that_is_not_there_is_named() {
    if Command::new("ssh").arg("-V").output().is_err() {
        println!("SKIP ssh: not found");
        return;
    }
    let attempt = async |host: &str| {
        let destination = Destination::Ssh {
            user: None,
            host: host.into(),
            options: vec![format!("Port={}", free_port())],
        };
        connect(&destination, hello("t", "host1", "m1"), SOON)
            .await
            .unwrap_err()
    };
    let error = attempt("127.0.0.1").await;
    assert!(matches!(error, ChannelError::SshRefused { .. }), "{error}");
    let error = attempt("no-such-host.invalid").await;
    assert!(
        matches!(error, ChannelError::NameNotResolved { .. }),
        "{error}"
    );
}
