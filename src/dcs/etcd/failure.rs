//! What an error of etcd means for us, and a sentence that says what to do about it.

use etcd_client::Error;
use tonic::{Code, ConnectError, Status};

use crate::config::EtcdConfig;
use crate::dcs::schema::Root;

#[derive(Clone, Debug)]
pub enum Failure {
    /// The request was not sent, or etcd turned it away before it did anything: another member may be asked.
    NotDone(String),
    /// As `NotDone`, because the settings do not fit this member (TLS): trying it again does not help.
    Misfit(String),
    /// Nothing was done because our login is out of date; the connection has to log in again.
    LoggedOut(String),
    /// No telling what was done.
    Unknown(String),
    /// An answer: no.
    Refused(String),
}

impl Failure {
    pub fn why(&self) -> &str {
        match self {
            Failure::NotDone(why)
            | Failure::Misfit(why)
            | Failure::LoggedOut(why)
            | Failure::Unknown(why)
            | Failure::Refused(why) => why,
        }
    }
}

/// What the sentences are made of.
pub struct About<'a> {
    pub endpoint: &'a str,
    /// It has answered us before, so the settings fit it.
    pub answered: bool,
    pub config: &'a EtcdConfig,
    pub root: &'a Root,
}

impl About<'_> {
    pub fn classify(&self, error: &Error) -> Failure {
        let at = self.endpoint;
        match error {
            Error::GRpcStatus(status) => self.classify_status(status),
            Error::InvalidArgs(why) => Failure::Refused(format!("{at}: {why}")),
            Error::InvalidUri(why) => {
                Failure::Refused(format!("{at} is not a URL: {why}; write it like https://10.0.0.1:2379"))
            }
            // Only from building the client: certificates or keys that rustls does not take.
            Error::TransportError(why) => {
                Failure::Refused(format!("{at}: {}; {}", root_cause(why), self.look_at_the_files()))
            }
            other => Failure::Unknown(format!("{at}: {other}")),
        }
    }

    fn classify_status(&self, status: &Status) -> Failure {
        let at = self.endpoint;
        let message = status.message();
        let says = |text: &str| message.contains(text);
        if let Some(misfit) = self.tls_misfit(status) {
            return misfit;
        }
        if not_connected(status) {
            let cause = root_cause(status);
            // What a server without TLS does, but one that is shutting down does it too.
            let guess = if cause.contains("handshake eof") && !self.answered {
                "; if etcd has no TLS, write http:// instead of https://"
            } else {
                ""
            };
            return Failure::NotDone(format!("{at}: {cause}{guess}"));
        }
        match status.code() {
            // Said by etcd's interceptor, before the request is looked at.
            Code::Unavailable if says("no leader") => {
                Failure::NotDone(format!("{at}: etcd has no leader (is a majority of its members up?)"))
            }
            Code::Unavailable if says("not capable") => Failure::NotDone(format!("{at}: etcd is still starting")),
            Code::Unavailable if says("not supported for learner") => {
                Failure::NotDone(format!("{at}: is a learner of etcd, which does not answer us"))
            }
            // Said before the request is proposed.
            Code::ResourceExhausted if says("too many requests") => {
                Failure::NotDone(format!("{at}: etcd is overloaded"))
            }
            Code::ResourceExhausted if says("space exceeded") => Failure::Refused(format!(
                "{at}: etcd's database is full; compact and defragment it, then `etcdctl alarm disarm`"
            )),
            // A token of 300 s ended, or users and rights were changed since we logged in.
            Code::Unauthenticated => Failure::LoggedOut(format!("{at}: {message}")),
            Code::InvalidArgument if says("auth store is old") => Failure::LoggedOut(format!("{at}: {message}")),
            Code::InvalidArgument if says("user name is empty") => match &self.config.user {
                Some(_) => Failure::LoggedOut(format!("{at}: {message}")),
                None => Failure::Refused(format!("{at}: etcd wants a user: set etcd.user and etcd.password")),
            },
            Code::InvalidArgument if says("authentication failed") => Failure::Refused(format!(
                "{at}: etcd does not accept user `{}` with this password: check etcd.user and etcd.password",
                self.user()
            )),
            Code::PermissionDenied => Failure::Refused(format!(
                "{at}: user `{user}` has no right to {root}: `etcdctl role grant-permission <role of {user}> --prefix=true readwrite {root}`",
                user = self.user(),
                root = self.root.as_str(),
            )),
            Code::Unimplemented => Failure::Refused(format!(
                "{at}: does not speak etcd's protocol ({message}): is this etcd's client port?"
            )),
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::OutOfRange => Failure::Refused(format!("{at}: {message}")),
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss => Failure::Unknown(format!("{at}: {}{}", root_cause(status), self.suspicion())),
        }
    }

    /// rustls says what is wrong in its own words; the remedy is in our settings.
    fn tls_misfit(&self, status: &Status) -> Option<Failure> {
        let chain = chain(status).map(ToString::to_string).collect::<Vec<_>>().join(": ");
        let says = |text: &str| chain.contains(text);
        let at = self.endpoint;
        let cause = root_cause(status);
        let remedy = if says("UnknownIssuer") || says("CaUsedAsEndEntity") || says("BadSignature") {
            match &self.config.ca_file {
                Some(file) => format!(
                    "its certificate is not signed by the CA in {}: set etcd.ca_file to the CA that signed it",
                    file.display()
                ),
                None => "its certificate is not signed by a CA that this machine trusts: set etcd.ca_file to the CA that signed it".to_owned(),
            }
        } else if says("NotValidForName") || says("not valid for name") {
            "its certificate does not name this address (subject alternative names count, the common name does not): issue it again, or write the endpoint as the certificate names it".to_owned()
        } else if says("Expired") || says("NotValidYet") || says("expired") {
            "its certificate is not valid at this machine's time: renew it, or set the clock".to_owned()
        } else if says("InvalidContentType") {
            "answers without TLS: write http:// instead of https://, or enable TLS in etcd".to_owned()
        } else if says("CertificateRequired")
            || says("BadCertificate")
            || says("CertificateUnknown")
            || says("UnknownCA")
            || says("HandshakeFailure")
        {
            match &self.config.cert_file {
                Some(file) => format!(
                    "does not accept our certificate {}: sign it by the CA in etcd's --trusted-ca-file",
                    file.display()
                ),
                None => "wants a certificate from us: set etcd.cert_file and etcd.key_file".to_owned(),
            }
        } else if at.starts_with("http://") && says("frame with invalid size") {
            // What our HTTP/2 makes of the TLS alert that comes back.
            "answers with TLS: write https:// instead of http://, and set etcd.ca_file".to_owned()
        } else {
            return None;
        };
        Some(Failure::Misfit(format!("{at}: {remedy} ({cause})")))
    }

    /// A member that hung up on us and never answered before may not like our settings. It does say so, in a TLS alert that
    /// gets lost more often than not: with TLS 1.3 it comes when we believe to be connected already.
    fn suspicion(&self) -> String {
        if self.answered {
            return String::new();
        }
        let guess = match (&self.config.cert_file, self.endpoint.starts_with("https://")) {
            (_, false) => "if etcd has TLS, write https:// instead of http://, and set etcd.ca_file".to_owned(),
            (None, true) => "if it wants a certificate from us, set etcd.cert_file and etcd.key_file".to_owned(),
            (Some(file), true) => {
                format!("does it take our certificate {}, signed by the CA in its --trusted-ca-file?", file.display())
            }
        };
        format!("; it never answered yet: {guess}")
    }

    fn user(&self) -> &str {
        self.config.user.as_ref().map_or("", |(name, _)| name)
    }

    fn look_at_the_files(&self) -> &'static str {
        "look at etcd.ca_file, etcd.cert_file and etcd.key_file"
    }
}

/// Only an error of tonic's connector proves that nothing was sent.
fn not_connected(status: &Status) -> bool {
    chain(status).any(|error| error.is::<ConnectError>())
}

fn chain<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

/// The last in the chain says most: "connection refused", "invalid peer certificate".
fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    chain(error).last().map_or_else(String::new, |error| match error.downcast_ref::<Status>() {
        Some(status) => status.message().to_owned(),
        None => error.to_string(),
    })
}
