//! An authority that certifies standing agents and their sources.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use crate::error::{Attempt, Result};

/// An authority whose files lie in one directory: `ca.pem`, and for each name
/// `NAME.cert` and `NAME.key`.
#[derive(Debug)]
pub struct Authority {
    directory: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    /// A new one, with its certificate in a directory that is there.
    ///
    /// # Errors
    ///
    /// If the certificate cannot be made or written.
    pub fn in_dir(directory: &Path) -> Result<Self> {
        let issuer = || -> std::result::Result<_, rcgen::Error> {
            let mut params = CertificateParams::new(Vec::new())?;
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            CertifiedIssuer::self_signed(params, KeyPair::generate()?)
        };
        let issuer = issuer()
            .map_err(io::Error::other)
            .attempt(|| "make an authority".to_owned())?;
        let authority = Self {
            directory: directory.to_owned(),
            issuer,
        };
        write(&authority.ca(), &authority.issuer.pem())?;
        Ok(authority)
    }

    /// The authority's own certificate.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.directory.join("ca.pem")
    }

    /// A fresh certificate for a name, and its key.
    ///
    /// # Errors
    ///
    /// If they cannot be made or written.
    pub fn certify(&self, name: &str) -> Result<(PathBuf, PathBuf)> {
        let made = || -> std::result::Result<_, rcgen::Error> {
            let key = KeyPair::generate()?;
            let mut params = CertificateParams::new(vec![name.to_owned()])?;
            // Under the authority's own name OpenSSL would take it for self-signed.
            params.distinguished_name.push(DnType::CommonName, name);
            Ok((params.signed_by(&key, &self.issuer)?, key))
        };
        let (certificate, key) = made()
            .map_err(io::Error::other)
            .attempt(|| format!("certify {name}"))?;
        let path = |end: &str| self.directory.join(format!("{name}.{end}"));
        write(&path("cert"), &certificate.pem())?;
        write(&path("key"), &key.serialize_pem())?;
        Ok((path("cert"), path("key")))
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).attempt(|| format!("write {}", path.display()))
}
