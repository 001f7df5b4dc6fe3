//! A standing agent and its sources, with certificates of a real authority.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests, where a panic is the verdict"
)]

use std::{
    error::Error as _,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use migrate_channel::{ChannelError, Destination, Frame, StandingAgent, TlsFiles, connect};
use migrate_core::wire::{Hello, Message, PROTOCOL_VERSION};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

const SOON: Duration = Duration::from_secs(10);

fn hello(release: &str, hostname: &str) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        release: release.into(),
        hostname: hostname.into(),
        migration_id: "m1".into(),
    }
}

/// An authority, and the directory with what it has certified.
struct Authority {
    _directory: TempDir,
    authority: migrate_test_hosts::Authority,
}

impl Authority {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = migrate_test_hosts::Authority::in_dir(directory.path()).unwrap();
        Self {
            _directory: directory,
            authority,
        }
    }

    fn ca(&self) -> PathBuf {
        self.authority.ca()
    }

    fn files(&self, name: &str) -> TlsFiles {
        let (cert, key) = self.authority.certify(name).unwrap();
        TlsFiles {
            ca: self.ca(),
            cert,
            key,
        }
    }
}

async fn agent(files: TlsFiles) -> StandingAgent {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    StandingAgent::bind(listen, &files, None).await.unwrap()
}

fn to(host: &str, port: u16, files: TlsFiles) -> Destination {
    Destination::parse(&format!("{host}:{port}"), Some(files)).unwrap()
}

#[tokio::test]
async fn only_named_peers_are_let_in() {
    let authority = Authority::new();
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let names = ["host3".to_owned(), "host1".to_owned()];
    let agent = StandingAgent::bind(listen, &authority.files("localhost"), Some(&names))
        .await
        .unwrap();
    let port = agent.local_addr().port();
    let destination = to("localhost", port, authority.files("host2"));
    let error = refused(&agent, &destination).await;
    assert!(error.help().is_some(), "{error}");
    let destination = to("localhost", port, authority.files("host1"));
    let (source, accepted) = tokio::join!(
        connect(&destination, hello("1", "host1"), SOON),
        agent.accept(hello("1", "localhost")),
    );
    assert_eq!(accepted.unwrap().hello.hostname, "host1");
    source.unwrap();
}

/// Connects while the agent waits; it must not let anybody in.
async fn refused(agent: &StandingAgent, destination: &Destination) -> ChannelError {
    tokio::select! {
        source = connect(destination, hello("1", "host1"), SOON) => source.unwrap_err(),
        accepted = agent.accept(hello("1", "host2")) => panic!("let in: {accepted:?}"),
    }
}

#[tokio::test]
async fn sources_of_the_authority_are_served_one_after_the_other() {
    let authority = Authority::new();
    let agent = agent(authority.files("127.0.0.1")).await;
    let port = agent.local_addr().port();
    for _ in 0..3 {
        let destination = to("127.0.0.1", port, authority.files("host1"));
        let (source, accepted) = tokio::join!(
            connect(&destination, hello("1", "host1"), SOON),
            agent.accept(hello("1", "host2"))
        );
        let (mut source, mut accepted) = (source.unwrap(), accepted.unwrap());
        assert_eq!(source.peer.hostname, "host2");
        assert_eq!(accepted.hello.hostname, "host1");
        assert!(source.ssh.is_none());
        source.sender.control(&Message::Go).await.unwrap();
        let frame = accepted.receiver.next(SOON).await.unwrap();
        assert_eq!(frame, Frame::Control(Message::Go));
    }
}

#[tokio::test]
async fn a_source_of_another_authority_is_refused_on_both_sides() {
    // Both have the same name, as after making the authority anew.
    let (ours, other) = (Authority::new(), Authority::new());
    let agent = agent(ours.files("127.0.0.1")).await;
    let port = agent.local_addr().port();

    // It trusts the agent, and the agent does not trust it.
    let mut files = other.files("host1");
    files.ca = ours.ca();
    let error = refused(&agent, &to("127.0.0.1", port, files)).await;
    assert!(matches!(error, ChannelError::Handshake { .. }), "{error}");
    let help = error.help().unwrap();
    assert!(help.contains("refused our certificate"), "{help}");

    // It does not trust the agent.
    let files = other.files("host1");
    let error = refused(&agent, &to("127.0.0.1", port, files)).await;
    let help = error.help().unwrap();
    assert!(help.contains("--ca"), "{help}");
}

#[tokio::test]
async fn an_agent_with_another_name_is_refused() {
    let authority = Authority::new();
    let agent = agent(authority.files("host2.example")).await;
    let port = agent.local_addr().port();
    let error = refused(&agent, &to("127.0.0.1", port, authority.files("host1"))).await;
    let help = error.help().unwrap();
    assert!(help.contains("does not name the host"), "{help}");
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let authority = Authority::new();
    let files = authority.files("127.0.0.1");
    let agent = agent(files).await;
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(authority.ca()).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"migrate".to_vec()];
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let visit = async {
        let tcp = TcpStream::connect(agent.local_addr()).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let mut stream = connector.connect(name, tcp).await.unwrap();
        stream.read_u8().await.unwrap_err().to_string()
    };
    tokio::select! {
        verdict = visit => assert!(verdict.contains("CertificateRequired"), "{verdict}"),
        accepted = agent.accept(hello("1", "host2")) => panic!("let in: {accepted:?}"),
    }
}

#[tokio::test]
async fn another_release_is_named_and_the_agent_serves_on() {
    let authority = Authority::new();
    let agent = agent(authority.files("127.0.0.1")).await;
    let destination = to(
        "127.0.0.1",
        agent.local_addr().port(),
        authority.files("host1"),
    );
    let visits = async {
        let error = connect(&destination, hello("2", "host1"), SOON)
            .await
            .unwrap_err();
        assert!(matches!(error, ChannelError::Version { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("release 1") && text.contains("release 2"));
        connect(&destination, hello("1", "host1"), SOON)
            .await
            .unwrap()
    };
    let (_source, accepted) = tokio::join!(visits, agent.accept(hello("1", "host2")));
    assert_eq!(accepted.unwrap().hello.release, "1");
}

#[tokio::test]
async fn silent_strangers_are_in_nobodys_way() {
    let authority = Authority::new();
    let agent = agent(authority.files("127.0.0.1")).await;
    let address = agent.local_addr();
    let mut strangers = Vec::new();
    for _ in 0..8 {
        strangers.push(TcpStream::connect(address).await.unwrap());
    }
    let destination = to("127.0.0.1", address.port(), authority.files("host1"));
    let (source, accepted) = tokio::join!(
        connect(&destination, hello("1", "host1"), SOON),
        agent.accept(hello("1", "host2"))
    );
    let _both = (source.unwrap(), accepted.unwrap());
}

/// Waits until a stranger has come to an end, whom the agent must not let in.
async fn keeps_out<T>(agent: &StandingAgent, stranger: impl Future<Output = T>) -> T {
    let let_in = async {
        loop {
            // A stranger may be named in an error.
            if let Ok(connection) = agent.accept(hello("1", "host2")).await {
                break connection;
            }
        }
    };
    tokio::select! {
        said = stranger => said,
        connection = let_in => panic!("let in: {connection:?}"),
    }
}

/// Somebody with a right certificate is let in.
async fn serves(agent: &StandingAgent, authority: &Authority) {
    let port = agent.local_addr().port();
    let destination = to("127.0.0.1", port, authority.files("host1"));
    let (source, accepted) = tokio::join!(
        connect(&destination, hello("1", "host1"), SOON),
        agent.accept(hello("1", "host2"))
    );
    let _both = (source.unwrap(), accepted.unwrap());
}

/// What a client that speaks no more than TLS 1.2 says first, RFC 5246, 7.4.1.2.
fn tls12_hello() -> Vec<u8> {
    let with_length = |bytes: &[u8]| {
        let length = u16::try_from(bytes.len()).unwrap();
        [&length.to_be_bytes(), bytes].concat()
    };
    let extension = |kind: u16, body: &[u8]| [&kind.to_be_bytes()[..], &with_length(body)].concat();
    let extensions = [
        // supported_groups: x25519, secp256r1
        extension(10, &[0, 4, 0, 0x1d, 0, 0x17]),
        // ec_point_formats: uncompressed
        extension(11, &[1, 0]),
        // signature_algorithms: ecdsa_secp256r1_sha256, rsa_pss_rsae_sha256
        extension(13, &[0, 4, 4, 3, 8, 4]),
        // application_layer_protocol_negotiation
        extension(16, &with_length(b"\x07migrate")),
    ]
    .concat();
    let body = [
        &[3, 3][..],
        &[7; 32],
        // No session; ECDHE with AES-128-GCM; no compression.
        &[0],
        &with_length(&[0xc0, 0x2b, 0xc0, 0x2f]),
        &[1, 0],
        &with_length(&extensions),
    ]
    .concat();
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    let handshake = [&[1][..], &length[1..], &body].concat();
    [&[22, 3, 1][..], &with_length(&handshake)].concat()
}

#[tokio::test]
async fn an_older_tls_is_refused() {
    /// A fatal alert, `protocol_version`: RFC 8446, 6.2.
    const ALERT: [u8; 7] = [21, 3, 3, 0, 2, 2, 70];
    let authority = Authority::new();
    let agent = agent(authority.files("127.0.0.1")).await;
    let said = keeps_out(&agent, async {
        let mut tcp = TcpStream::connect(agent.local_addr()).await.unwrap();
        tcp.write_all(&tls12_hello()).await.unwrap();
        let mut said = Vec::new();
        tcp.read_to_end(&mut said).await.unwrap();
        said
    })
    .await;
    assert_eq!(said, ALERT);
    serves(&agent, &authority).await;
}

/// All that a source has said once, said again: neither its hello nor anything
/// behind it opens the door a second time.
#[tokio::test]
async fn what_was_recorded_opens_nothing() {
    let authority = Authority::new();
    let agent = agent(authority.files("127.0.0.1")).await;
    let tap = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = tap.local_addr().unwrap().port();
    let agent_at = agent.local_addr();
    let recorded = tokio::spawn(async move {
        let (source, _) = tap.accept().await.unwrap();
        let (mut from, mut back) = source.into_split();
        let (mut answers, mut to) = TcpStream::connect(agent_at).await.unwrap().into_split();
        tokio::spawn(async move { tokio::io::copy(&mut answers, &mut back).await });
        let (mut all, mut some) = (Vec::new(), [0; 4096]);
        loop {
            match from.read(&mut some).await {
                Ok(read) if read > 0 => {
                    all.extend_from_slice(&some[..read]);
                    to.write_all(&some[..read]).await.unwrap();
                }
                _ => break all,
            }
        }
    });
    let destination = to("127.0.0.1", port, authority.files("host1"));
    let (source, accepted) = tokio::join!(
        connect(&destination, hello("1", "host1"), SOON),
        agent.accept(hello("1", "host2"))
    );
    assert_eq!(accepted.unwrap().hello.hostname, "host1");
    drop(source.unwrap());
    let recorded = recorded.await.unwrap();
    // More than a hello: the certificate, its signature, the introduction.
    assert!(recorded.len() > 512, "{}", recorded.len());
    keeps_out(&agent, async {
        let mut tcp = TcpStream::connect(agent_at).await.unwrap();
        tcp.write_all(&recorded).await.unwrap();
        // To the end, which may be a reset: more was sent than was read.
        let _ = tcp.read_to_end(&mut Vec::new()).await;
    })
    .await;
    serves(&agent, &authority).await;
}

#[tokio::test]
async fn a_port_of_something_else_is_named() {
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let other = async {
        let (mut tcp, _) = listener.accept().await.unwrap();
        tcp.write_all(b"220 mail.example ESMTP\r\n").await.unwrap();
        let mut sink = Vec::new();
        let _ = tcp.read_to_end(&mut sink).await;
    };
    let destination = to("127.0.0.1", port, authority.files("host1"));
    let (result, ()) = tokio::join!(connect(&destination, hello("1", "host1"), SOON), other);
    let error = result.unwrap_err();
    assert!(matches!(error, ChannelError::Handshake { .. }), "{error}");
    assert!(error.help().unwrap().contains("port of a migrate agent"));
}

#[tokio::test]
async fn a_port_where_nobody_answers_is_given_up_in_time() {
    let authority = Authority::new();
    let destination = |port| to("127.0.0.1", port, authority.files("host1"));

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    // Enough to be let in, by the kernel alone.
    let limit = Duration::from_secs(1);
    let error = connect(&destination(port), hello("1", "host1"), limit)
        .await
        .unwrap_err();
    assert!(error.is_deadline(), "{error}");
    assert!(error.to_string().contains("TLS handshake"), "{error}");

    drop(listener);
    let error = connect(&destination(port), hello("1", "host1"), SOON)
        .await
        .unwrap_err();
    assert!(
        matches!(error, ChannelError::DirectUnreachable { .. }),
        "{error}"
    );
    assert!(error.to_string().contains(&format!("127.0.0.1:{port}")));
    assert!(error.help().unwrap().contains("migrate agent"));
}

#[tokio::test]
async fn an_unknown_name_is_named() {
    let authority = Authority::new();
    let destination = to("no-such-host.invalid", 7000, authority.files("host1"));
    let error = connect(&destination, hello("1", "host1"), SOON)
        .await
        .unwrap_err();
    assert!(
        matches!(error, ChannelError::NameNotResolved { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn unusable_files_are_named() {
    let authority = Authority::new();
    let good = authority.files("host1");
    let other = authority.files("host3");
    let missing = Path::new("/nonexistent/key.pem").to_owned();
    let mut swapped = good.clone();
    swapped.key = good.cert.clone();
    let mut absent = good.clone();
    absent.key = missing.clone();
    let mut foreign = good.clone();
    foreign.key = other.key;
    for (files, expected) in [
        (swapped, "private key"),
        (absent, "/nonexistent/key.pem"),
        (foreign, "TLS"),
    ] {
        let error = connect(
            &to("127.0.0.1", 7000, files.clone()),
            hello("1", "host1"),
            SOON,
        )
        .await
        .unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.source().is_some() && error.help().is_some());
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let bound = StandingAgent::bind(listen, &files, None).await;
        assert!(bound.unwrap_err().to_string().contains(expected));
    }
}
