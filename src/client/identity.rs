//! The client's own certificate (`--cert`, `--key`), for a server that lets in whom it knows by one.

use std::path::Path;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use super::server::OwnCertificate;
use crate::token::{Kind, read_text};

/// Reads both from their PEM files.
///
/// # Errors
/// Which of them can't be used, in a sentence.
pub fn load(files: &OwnCertificate, provider: &CryptoProvider) -> Result<CertifiedKey, String> {
    let chain = certificates_in(&files.cert).map_err(|error| {
        let name = files.cert.display();
        format!("cannot use the certificates of --cert in {name}: {error}; write them as PEM")
    })?;
    let name = files.key.display();
    let cannot = |error: String| format!("cannot use the key of --cert in {name}: {error}");
    let key = key_in(&files.key).map_err(cannot)?;
    let key = provider.key_provider.load_private_key(key);
    let key = key.map_err(|error| cannot(error.to_string()))?;
    let identity = CertifiedKey::new(chain, key);
    match is_of_key(&identity) {
        true => Ok(identity),
        false => Err(format!(
            "the key in {name} is not that of the certificate of --cert: name the right one with --key"
        )),
    }
}

/// Whether the first certificate is the key's. rustls could tell, but not of a certificate of version 1, as openssl x509
/// -req makes them: webpki does not read it, and nor need a client.
fn is_of_key(identity: &CertifiedKey) -> bool {
    let (Some(public), Some(certificate)) = (identity.key.public_key(), identity.cert.first())
    else {
        return true;
    };
    let mut parts = certificate.windows(public.len());
    parts.any(|part| part == &*public)
}

/// The certificates in a PEM file, at least one.
///
/// # Errors
/// The end of a sentence.
pub fn certificates_in(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    match certificates {
        Ok(none) if none.is_empty() => Err("there are none".into()),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(error.to_string()),
    }
}

fn key_in(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let text = read_text(path, Kind::Any).map_err(|error| error.to_string())?;
    match PrivateKeyDer::from_pem_slice(text.as_bytes()) {
        // In both of its forms: PKCS #8, and OpenSSL's own.
        _ if text.contains("ENCRYPTED") => Err(
            "it has a passphrase, which nobody could be asked for: write it without one, by openssl pkey".into(),
        ),
        Ok(key) => Ok(key),
        Err(pem::Error::NoItemsFound) => Err(
            "there is none; write it as PEM, beside the certificate or in a file of --key".into(),
        ),
        Err(error) => Err(format!("{error}; write it as PEM")),
    }
}
