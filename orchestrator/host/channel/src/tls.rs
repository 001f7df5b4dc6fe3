//! TLS 1.3 with a certificate on both sides, in two flavours: one-time
//! certificates known byte by byte, and certificates of an authority.

use std::{fs, path::Path, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore,
    ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, ring, verify_tls13_signature},
    server::{
        NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version::TLS13,
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime, pem::PemObject as _,
};
use zeroize::Zeroizing;

use crate::{connect::TlsFiles, error::ChannelError};

/// Keeps a client of another protocol with a certificate of the same authority out.
const ALPN: &[u8] = b"migrate";

/// The name in one-time certificates. Nobody looks it up: the certificate itself is known.
pub(crate) const ONE_TIME_NAME: &str = "migrate.invalid";

/// A certificate with its key, made for one connection and never written down.
pub(crate) struct OneTimeIdentity {
    pub(crate) certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl OneTimeIdentity {
    pub(crate) fn generate() -> Result<Self, ChannelError> {
        let made = rcgen::generate_simple_self_signed([ONE_TIME_NAME.to_owned()]).map_err(setup)?;
        Ok(Self {
            certificate: made.cert.der().clone(),
            key: PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into(),
        })
    }

    /// A client that talks to the holder of `peer` only.
    pub(crate) fn client(
        self,
        peer: CertificateDer<'static>,
    ) -> Result<Arc<ClientConfig>, ChannelError> {
        let provider = provider();
        let config = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(setup)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned { peer, provider }))
            .with_client_auth_cert(vec![self.certificate], self.key)
            .map_err(setup)?;
        Ok(finish_client(config))
    }

    /// A server that talks to the holder of `peer` only.
    pub(crate) fn server(
        self,
        peer: CertificateDer<'static>,
    ) -> Result<Arc<ServerConfig>, ChannelError> {
        let provider = provider();
        let config = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(setup)?
            .with_client_cert_verifier(Arc::new(Pinned { peer, provider }))
            .with_single_cert(vec![self.certificate], self.key)
            .map_err(setup)?;
        Ok(finish_server(config))
    }
}

/// A client of a standing agent.
pub(crate) fn client_from_files(files: &TlsFiles) -> Result<Arc<ClientConfig>, ChannelError> {
    let loaded = Loaded::read(files)?;
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(setup)?
        .with_root_certificates(loaded.authority)
        .with_client_auth_cert(loaded.chain, loaded.key)
        .map_err(setup)?;
    Ok(finish_client(config))
}

/// The server of a standing agent.
pub(crate) fn server_from_files(
    files: &TlsFiles,
    peers: Option<&[String]>,
) -> Result<Arc<ServerConfig>, ChannelError> {
    let loaded = Loaded::read(files)?;
    let provider = provider();
    let clients =
        WebPkiClientVerifier::builder_with_provider(Arc::new(loaded.authority), provider.clone())
            .build()
            .map_err(setup)?;
    let clients: Arc<dyn ClientCertVerifier> = match peers {
        None => clients,
        Some(names) => Arc::new(Named {
            clients,
            names: names
                .iter()
                .map(|name| ServerName::try_from(name.clone()).map_err(setup))
                .collect::<Result<_, _>>()?,
        }),
    };
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(setup)?
        .with_client_cert_verifier(clients)
        .with_single_cert(loaded.chain, loaded.key)
        .map_err(setup)?;
    Ok(finish_server(config))
}

fn finish_client(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

fn finish_server(mut config: ServerConfig) -> Arc<ServerConfig> {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

/// ring, with the cipher first that moves most bytes on a CPU with AES instructions.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
            ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..ring::default_provider()
    })
}

fn setup(source: impl std::error::Error + Send + Sync + 'static) -> ChannelError {
    ChannelError::TlsSetup {
        source: Box::new(source),
    }
}

/// Accepts one certificate, the one that came through SSH, and only from a
/// peer that proves to hold its key.
#[derive(Debug)]
struct Pinned {
    peer: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl Pinned {
    fn check(&self, shown: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        if shown.as_ref() == self.peer.as_ref() {
            Ok(())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// The answer to a TLS 1.2 signature, which no configuration here lets happen.
fn too_old() -> rustls::Error {
    rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered)
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

/// Accepts clients of the authority that have one of these names.
#[derive(Debug)]
struct Named {
    clients: Arc<dyn ClientCertVerifier>,
    names: Vec<ServerName<'static>>,
}

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.clients.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .clients
            .verify_client_cert(end_entity, intermediates, now)?;
        let shown = ParsedCertificate::try_from(end_entity)?;
        if self
            .names
            .iter()
            .any(|name| verify_server_name(&shown, name).is_ok())
        {
            Ok(verified)
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.clients.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.clients.supported_verify_schemes()
    }
}

/// The contents of [`TlsFiles`].
struct Loaded {
    authority: RootCertStore,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Loaded {
    fn read(files: &TlsFiles) -> Result<Self, ChannelError> {
        const CA: &str = "CA certificate";
        const CERT: &str = "certificate";
        const KEY: &str = "private key";
        let mut authority = RootCertStore::empty();
        for certificate in certificates(CA, &files.ca)? {
            authority
                .add(certificate)
                .map_err(|error| unusable(CA, &files.ca, error))?;
        }
        let chain = certificates(CERT, &files.cert)?;
        let pem = read(KEY, &files.key)?;
        let key = PrivateKeyDer::from_pem_slice(&pem)
            .map_err(|error| unusable(KEY, &files.key, error))?;
        Ok(Self {
            authority,
            chain,
            key,
        })
    }
}

fn certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, ChannelError> {
    let pem = read(what, path)?;
    let found = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| unusable(what, path, error))?;
    if found.is_empty() {
        let error = rustls_pki_types::pem::Error::NoItemsFound;
        return Err(unusable(what, path, error));
    }
    Ok(found)
}

/// Wiped after use: one of the files is a private key.
fn read(what: &'static str, path: &Path) -> Result<Zeroizing<Vec<u8>>, ChannelError> {
    fs::read(path)
        .map(Zeroizing::new)
        .map_err(|source| ChannelError::ReadCredentials {
            what,
            path: path.to_owned(),
            source,
        })
}

fn unusable(
    what: &'static str,
    path: &Path,
    error: impl std::error::Error + Send + Sync + 'static,
) -> ChannelError {
    ChannelError::ParseCredentials {
        what,
        path: path.to_owned(),
        source: Box::new(error),
    }
}
