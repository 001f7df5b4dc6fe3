//! An OpenVPN over TCP, from the client to the workload's address, and a server behind it that the
//! client reaches through the tunnel alone.
//!
//! ```text
//!   client ── tun0 10.8.0.2 ═══ TLS over TCP ═══ tun0 10.8.0.1 ── host1 ── eth0 ── host2 192.0.2.1
//! ```
//!
//! The device of the server's host is the host's own and made by it at each boot.

use std::path::{Path, PathBuf};

use migrate_test_hosts::{Authority, HostName, INTERFACE, WORKLOAD_V4};

/// What the names of an end's certificates and keys begin with.
const KEYS: &str = "/srv/vpn";
/// Where the server listens.
pub const PORT: u16 = 1194;
/// The server behind the tunnel.
pub const BEHIND: &str = "192.0.2.1";
/// The client's end of the tunnel.
pub const CLIENT: &str = "10.8.0.2";
/// On the client, once the tunnel is up.
pub const ROUTE: &str = "ip route add 192.0.2.1 dev tun0 src 10.8.0.2";
/// What the client says of itself.
pub const CLIENT_LOG: &str = "/srv/vpn.log";
/// Where a server of HTTP is, behind the tunnel.
pub const DOWNLOADS: u16 = 8080;
/// In its log, once for every time that the two have agreed on keys.
pub const AGREED: &str = "Peer Connection Initiated";

/// What makes the server's device, in a shell.
pub const DEVICE: &str = "ip tuntap add dev tun0 mode tun && \
     ip address add 10.8.0.1 peer 10.8.0.2 dev tun0 && ip link set tun0 up";

/// One end of the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At the workload's address.
    Server,
    /// Which nobody parks.
    Client,
}

impl End {
    const fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }

    /// What the end needs of what [`certify`] made in `dir`, and where it has to come to.
    #[must_use]
    pub fn keys(self, dir: &Path) -> [(PathBuf, String); 3] {
        let own = |end: &str| format!("{}.{end}", self.name());
        ["ca.pem".to_owned(), own("cert"), own("key")]
            .map(|name| (dir.join(&name), format!("{KEYS}.{name}")))
    }
}

/// Makes an authority and a certificate for each end.
///
/// # Errors
///
/// When they cannot be made or written.
pub fn certify(dir: &Path) -> migrate_test_hosts::Result<()> {
    let authority = Authority::in_dir(dir)?;
    for end in [End::Server, End::Client] {
        authority.certify(end.name())?;
    }
    Ok(())
}

/// The server's host as a router, in a shell.
#[must_use]
pub fn router() -> String {
    let behind = HostName::Host2.ipv4();
    format!("sysctl -qw net.ipv4.ip_forward=1 && ip route replace {BEHIND} via {behind}")
}

/// The host with the server behind it, in a shell.
#[must_use]
pub fn behind() -> String {
    let router = HostName::Host1.ipv4();
    format!("ip address add {BEHIND}/32 dev lo && ip route add {CLIENT} via {router}")
}

/// The device and the routes of the server's host for systemd: files of `/etc`, and what is in them.
#[must_use]
pub fn networkd() -> [(String, String); 4] {
    let behind = HostName::Host2.ipv4();
    let network = |name: &str| format!("systemd/network/{name}");
    [
        (
            network("tun0.netdev"),
            "[NetDev]\nName=tun0\nKind=tun\n".to_owned(),
        ),
        // Nobody is attached to the device until the server is back, and the server comes back when
        // the host is online.
        (
            network("tun0.network"),
            "[Match]\nName=tun0\n[Link]\nRequiredForOnline=no\n\
             [Network]\nConfigureWithoutCarrier=yes\nLinkLocalAddressing=no\n\
             [Address]\nAddress=10.8.0.1/32\nPeer=10.8.0.2/32\n"
                .to_owned(),
        ),
        (
            network(&format!("{INTERFACE}.network.d/behind.conf")),
            format!("[Route]\nDestination={BEHIND}/32\nGateway={behind}\n"),
        ),
        (
            "sysctl.d/router.conf".to_owned(),
            "net.ipv4.ip_forward = 1\n".to_owned(),
        ),
    ]
}

/// The server.
#[must_use]
pub fn server() -> Vec<String> {
    let local = WORKLOAD_V4.to_string();
    let own = [
        "--proto",
        "tcp-server",
        "--local",
        &local,
        "--ifconfig-noexec",
        "--log",
        "/dev/null",
    ];
    openvpn(End::Server, "tun0", PORT, &own)
}

/// The client.
#[must_use]
pub fn client() -> Vec<String> {
    let remote = WORKLOAD_V4.to_string();
    let own = [
        "--proto",
        "tcp-client",
        "--nobind",
        "--remote",
        &remote,
        "--ifconfig",
        CLIENT,
        "10.8.0.1",
        "--verb",
        "3",
        "--log",
        CLIENT_LOG,
    ];
    openvpn(End::Client, "tun0", PORT, &own)
}

/// An `openvpn` at a device of any name.
#[must_use]
pub fn openvpn(end: End, device: &str, port: u16, more: &[&str]) -> Vec<String> {
    let port = port.to_string();
    let device = ["--dev", device, "--dev-type", "tun", "--port", &port];
    let [ca, certificate, key] = end.keys(Path::new("")).map(|(_, path)| path);
    // Each asks the other whether it is there. Who hears nothing gives up, but no sooner than a
    // maintenance takes.
    let alive = ["--ping", "5", "--ping-restart", "900"];
    let tls = match end {
        End::Server => &["--tls-server", "--dh", "none"][..],
        End::Client => &["--tls-client"],
    };
    let keys = ["--ca", &ca, "--cert", &certificate, "--key", &key];
    let words = ["openvpn"].iter().chain(&device).chain(more).chain(tls);
    let words = words.chain(&keys).chain(&alive);
    words.map(|word| (*word).to_owned()).collect()
}
