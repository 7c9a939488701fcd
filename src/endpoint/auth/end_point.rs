//! `tls-server-end-point` (RFC 5929 §4.1): a certificate under the hash of its own signature, SHA-256 in place of MD5 and SHA-1.

use std::sync::Arc;

use sha2::{Digest as _, Sha256, Sha384, Sha512};
use x509_cert::Certificate;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{Any, AnyRef, Decode as _, Reader as _, SliceReader, Tag, Tagged as _};

/// RSASSA-PSS: its parameters name the hash.
const PSS: &str = "1.2.840.113549.1.1.10";
const SHA1: &str = "1.3.14.3.2.26";

/// By object identifier: of the signature, or (PSS) of the hash alone.
const SHA256: &[&str] = &[
    "1.2.840.113549.1.1.4",  // md5WithRSAEncryption
    "1.2.840.113549.1.1.5",  // sha1WithRSAEncryption
    "1.2.840.113549.1.1.11", // sha256WithRSAEncryption
    "1.2.840.10045.4.1",     // ecdsa-with-SHA1
    "1.2.840.10045.4.3.2",   // ecdsa-with-SHA256
    SHA1,
    "2.16.840.1.101.3.4.2.1", // SHA-256
];
const SHA384: &[&str] = &["1.2.840.113549.1.1.12", "1.2.840.10045.4.3.3", "2.16.840.1.101.3.4.2.2"];
const SHA512: &[&str] = &["1.2.840.113549.1.1.13", "1.2.840.10045.4.3.4", "2.16.840.1.101.3.4.2.3"];

/// `None` where the signature has no hash of its own (Ed25519): channel binding cannot be offered then.
pub fn end_point(der: &[u8]) -> Option<Arc<[u8]>> {
    let certificate = Certificate::from_der(der).ok()?;
    let algorithm = certificate.signature_algorithm();
    let name = algorithm.oid.to_string();
    let name = if name == PSS { pss_hash(algorithm.parameters.as_ref()?)? } else { name };
    let is = |names: &[&str]| names.contains(&name.as_str());
    if is(SHA256) {
        Some(Arc::from(Sha256::digest(der).as_slice()))
    } else if is(SHA384) {
        Some(Arc::from(Sha384::digest(der).as_slice()))
    } else if is(SHA512) {
        Some(Arc::from(Sha512::digest(der).as_slice()))
    } else {
        None
    }
}

/// `RSASSA-PSS-params ::= SEQUENCE { hashAlgorithm [0] AlgorithmIdentifier DEFAULT sha1, … }`
fn pss_hash(parameters: &Any) -> Option<String> {
    let mut fields = SliceReader::new(parameters.value()).ok()?;
    if fields.is_finished() {
        return Some(SHA1.to_owned());
    }
    let first = AnyRef::decode(&mut fields).ok()?;
    match first.tag() {
        Tag::ContextSpecific { number, .. } if number.value() == 0 => {}
        _ => return Some(SHA1.to_owned()),
    }
    let algorithm = AnyRef::from_der(first.value()).ok()?;
    let mut algorithm = SliceReader::new(algorithm.value()).ok()?;
    let oid: ObjectIdentifier = ObjectIdentifier::decode(&mut algorithm).ok()?;
    Some(oid.to_string())
}
