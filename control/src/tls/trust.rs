//! Whom we believe without an authority: whoever holds the key of the one certificate that we were
//! told of, or of any.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use sha2::{Digest, Sha256};

/// The hash by which a certificate is told from all others: SHA-256 of its DER.
pub(crate) fn hash(certificate: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(certificate).into()
}

/// Believes whoever holds the key of the certificate that he shows, whatever it says; of this hash,
/// if there is one.
#[derive(Debug)]
pub(crate) struct Holder {
    certificate: Option<[u8; 32]>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Holder {
    /// Of any certificate.
    pub(crate) fn of_any(provider: &CryptoProvider) -> Holder {
        Holder {
            certificate: None,
            algorithms: provider.signature_verification_algorithms,
        }
    }

    /// Of the one whose hash this is.
    pub(crate) fn of(certificate: [u8; 32], provider: &CryptoProvider) -> Holder {
        Holder {
            certificate: Some(certificate),
            ..Holder::of_any(provider)
        }
    }
}

impl ServerCertVerifier for Holder {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self
            .certificate
            .is_none_or(|wanted| hash(certificate) == wanted)
        {
            return Ok(ServerCertVerified::assertion());
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
