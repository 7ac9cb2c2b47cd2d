//! Connecting to a network element.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::SockRef;
use thiserror::Error;
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::time::timeout;

use super::address::NeAddress;
use crate::secret::tcp_security::Protection;

/// Longest wait for a connection, whatever the keepalive interval.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// Shortest; below it, one lost packet would be enough to fail.
const PATIENCE_MIN: Duration = Duration::from_secs(1);

/// Why a network element could not be connected to.
#[derive(Debug, Error)]
pub enum DialError {
    /// Its name has no address.
    #[error("its name cannot be resolved: {0}")]
    Resolve(#[source] io::Error),
    /// Its name has addresses, but none of the family of `--source`.
    #[error("it has no address that can be reached from {0}")]
    Family(IpAddr),
    /// The address of `--source` is not this host's (yet).
    #[error("{0} is not an address of this host (see --source and `ip addr`)")]
    Source(IpAddr),
    /// It did not answer in time.
    #[error(
        "no connection within {} s (where TTL security or TCP-MD5 does not fit there is no answer either)",
        .0.as_secs_f64()
    )]
    Timeout(Duration),
    /// Nobody listens.
    #[error("connection refused; does `necp ne` run there, and listen on that port?")]
    Refused,
    /// Anything else.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Connects to `ne`, from `source` if given. `patience` is three keepalive intervals: as long as data may stay
/// unacknowledged (TCP_USER_TIMEOUT), so that TCP gives up no later than the session does.
///
/// # Errors
/// See [`DialError`]; of several addresses, that of the last one.
pub async fn dial(
    ne: &NeAddress,
    source: Option<IpAddr>,
    protection: &Protection,
    patience: Duration,
) -> Result<TcpStream, DialError> {
    let patience = patience.max(PATIENCE_MIN);
    let limit = patience.min(CONNECT_MAX);
    let addresses = timeout(limit, lookup_host((ne.host.as_str(), ne.port)))
        .await
        .map_err(|_| DialError::Timeout(limit))?
        .map_err(DialError::Resolve)?;
    let mut last = None;
    // `::ffff:10.0.0.1` is the IPv4 address.
    let addresses = addresses.map(|to| SocketAddr::new(to.ip().to_canonical(), to.port()));
    for address in addresses.filter(|to| source.is_none_or(|from| from.is_ipv4() == to.is_ipv4())) {
        match timeout(limit, connect(address, source, protection, patience)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = Some(error),
            Err(_) => last = Some(DialError::Timeout(limit)),
        }
    }
    Err(match (last, source) {
        (Some(error), _) => error,
        (None, Some(source)) => DialError::Family(source),
        (None, None) => DialError::Resolve(io::Error::from(io::ErrorKind::NotFound)),
    })
}

async fn connect(
    to: SocketAddr,
    source: Option<IpAddr>,
    protection: &Protection,
    patience: Duration,
) -> Result<TcpStream, DialError> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(from) = source {
        socket.bind((from, 0).into()).map_err(|error| match error.kind() {
            io::ErrorKind::AddrNotAvailable => DialError::Source(from),
            _ => error.into(),
        })?;
    }
    protection.apply(&socket, to.ip())?;
    let options = SockRef::from(&socket);
    options.set_tcp_nodelay(true)?;
    options.set_tcp_user_timeout(Some(patience))?;
    // KEEPALIVE is the protocol's own.
    options.set_keepalive(false)?;
    socket.connect(to).await.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => DialError::Refused,
        _ => error.into(),
    })
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(15);

    async fn listener() -> (TcpListener, NeAddress) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        (listener, NeAddress { host: "127.0.0.1".into(), port })
    }

    #[tokio::test]
    async fn options_and_source_are_set() {
        let (listener, ne) = listener().await;
        let source = "127.9.9.9".parse().expect("an address");
        let stream = dial(&ne, Some(source), &Protection::default(), PATIENCE).await.expect("connected");
        assert_eq!(listener.accept().await.expect("accepted").1.ip(), source);
        let options = SockRef::from(&stream);
        assert!(options.tcp_nodelay().expect("an option") && !options.keepalive().expect("an option"));
        assert_eq!(options.tcp_user_timeout().expect("an option"), Some(PATIENCE));
    }

    #[tokio::test]
    async fn failures_say_what_to_do() {
        let (listener, ne) = listener().await;
        let error = async |source: &str| {
            let source: IpAddr = source.parse().expect("an address");
            dial(&ne, Some(source), &Protection::default(), PATIENCE).await.expect_err("cannot work").to_string()
        };
        assert!(error("192.0.2.77").await.contains("192.0.2.77 is not an address of this host"));
        assert_eq!(error("::1").await, "it has no address that can be reached from ::1");
        drop(listener);
        assert!(matches!(dial(&ne, None, &Protection::default(), PATIENCE).await, Err(DialError::Refused)));
    }
}
