//! Who a client certificate says that somebody is. Read only after rustls has verified it.

use x509_cert::Certificate;
use x509_cert::der::Decode as _;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// 2.5.4.3, id-at-commonName.
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The last one of the subject, as PostgreSQL takes it.
    pub common_name: Option<String>,
    /// Alternative names: DNS names and URIs.
    pub alternative: Vec<String>,
    /// The whole subject, for the log.
    pub subject: String,
}

#[derive(Debug, thiserror::Error)]
#[error("read the client's certificate: {0}")]
pub struct Unreadable(String);

impl ClientCertificate {
    pub fn read(der: &[u8]) -> Result<ClientCertificate, Unreadable> {
        let unreadable = |error: x509_cert::der::Error| Unreadable(error.to_string());
        let certificate = Certificate::from_der(der).map_err(unreadable)?;
        let body = certificate.tbs_certificate();
        let mut common_name = None;
        for pair in body.subject().iter().filter(|pair| pair.oid == COMMON_NAME) {
            // The value's own bytes whatever kind of string it is; PostgreSQL reads them as UTF-8 too.
            let text = std::str::from_utf8(pair.value.value()).map_err(|e| Unreadable(e.to_string()))?;
            // CVE-2009-4034: a name that ends before it ends.
            if text.contains('\0') {
                return Err(Unreadable("its common name contains a zero byte".to_owned()));
            }
            common_name = Some(text.to_owned());
        }
        let names = body.get_extension::<SubjectAltName>().map_err(|e| Unreadable(e.to_string()))?;
        let names = names.map(|(_, names)| names.0).unwrap_or_default();
        let alternative = names.iter().filter_map(|name| match name {
            GeneralName::DnsName(name) => Some(name.as_str().to_owned()),
            GeneralName::UniformResourceIdentifier(name) => Some(name.as_str().to_owned()),
            _ => None,
        });
        Ok(ClientCertificate {
            common_name,
            alternative: alternative.filter(|name| !name.contains('\0')).collect(),
            subject: body.subject().to_string(),
        })
    }

    /// May the holder be this user? By the common name, exactly, as `cert` and `clientcert=verify-full` of PostgreSQL.
    pub fn is_for(&self, user: &str) -> bool {
        self.common_name.as_deref() == Some(user)
    }

    /// The name under which a consumer is known: the common name, else the first alternative name.
    pub fn consumer(&self) -> Option<&str> {
        self.common_name.as_deref().or_else(|| self.alternative.first().map(String::as_str))
    }

    pub fn shown(&self) -> String {
        match &self.common_name {
            Some(name) => format!("\"{name}\""),
            None => format!("nobody: its subject \"{}\" has no common name", self.subject),
        }
    }
}
