//! The client's own certificate (`--cert`, `--key`), for a server that lets in whom it knows by one.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SigningKey};

use super::server::OwnCertificate;
use crate::token::{Kind, read_bytes};

/// Reads both from their PEM files, or from one that has both, which may be a pipe.
///
/// # Errors
/// Which of them can't be used, in a sentence.
pub fn load(files: &OwnCertificate, provider: &CryptoProvider) -> Result<CertifiedKey, String> {
    let name = files.cert.display();
    let of_cert = read(&files.cert, "--cert")?;
    let chain = certificates_in(&of_cert)
        .map_err(|why| format!("cannot use the certificates of --cert in {name}: {why}"))?;
    let of_key = match files.key == files.cert {
        true => of_cert,
        false => read(&files.key, "--key")?,
    };
    let name = files.key.display();
    let key = key_in(&of_key, provider);
    let key = key.map_err(|why| format!("cannot use the key of --cert in {name}: {why}"))?;
    let identity = CertifiedKey::new(chain, key);
    match is_of_key(&identity) {
        true => Ok(identity),
        false => Err(format!(
            "the key in {name} is not that of the certificate of --cert: name the right one with --key"
        )),
    }
}

/// What is in the file that `option` names.
///
/// # Errors
/// Why it can't be read, in a sentence.
pub fn read(path: &Path, option: &str) -> Result<Vec<u8>, String> {
    read_bytes(path, Kind::Any).map_err(|error| {
        let name = path.display();
        format!("cannot read {name}, which {option} names: {error}")
    })
}

/// Whether the first certificate is the key's. rustls could tell, but not of a certificate of version 1, as openssl x509
/// -req makes them: webpki does not read it, and nor need a client.
fn is_of_key(identity: &CertifiedKey) -> bool {
    let (Some(public), Some(certificate)) = (identity.key.public_key(), identity.cert.first())
    else {
        return true;
    };
    is_in(&public, certificate)
}

fn is_in(part: &[u8], bytes: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// The certificates in a PEM file, at least one.
///
/// # Errors
/// The end of a sentence.
pub fn certificates_in(file: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(file).collect();
    match certificates {
        Ok(none) if none.is_empty() && is_binary(file) => Err(BINARY.into()),
        Ok(none) if none.is_empty() => Err("there are none; write them as PEM".into()),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(format!("{error}; write them as PEM")),
    }
}

fn key_in(file: &[u8], provider: &CryptoProvider) -> Result<Arc<dyn SigningKey>, String> {
    let key = match PrivateKeyDer::from_pem_slice(file) {
        // In both of its forms: PKCS #8, and OpenSSL's own.
        _ if is_in(b"ENCRYPTED", file) => {
            return Err(
                "it has a passphrase, which nobody could be asked for: write it without one, by openssl pkey".into(),
            );
        }
        Ok(key) => key,
        Err(pem::Error::NoItemsFound) if is_binary(file) => return Err(BINARY.into()),
        Err(pem::Error::NoItemsFound) => {
            return Err(
                "there is none; write it as PEM, beside the certificate or in a file of --key"
                    .into(),
            );
        }
        Err(error) => return Err(format!("{error}; write it as PEM")),
    };
    let key = provider.key_provider.load_private_key(key);
    // rustls only says that it tried them all.
    key.map_err(|_| UNSUPPORTED.into())
}

const BINARY: &str = "it is binary and must be PEM: openssl x509 converts a certificate, openssl pkey a key, openssl pkcs12 -nodes a .p12";

/// What ring signs with.
const UNSUPPORTED: &str = "it is of no kind that is supported, or damaged: use RSA of 2048 to 4096 bits, ECDSA on P-256 or P-384, or Ed25519";

/// Whether it is DER or PKCS #12: either has a zero somewhere, no PEM has.
fn is_binary(file: &[u8]) -> bool {
    file.contains(&0)
}
