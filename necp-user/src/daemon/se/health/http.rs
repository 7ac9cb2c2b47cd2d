//! Health by HTTP: 2xx and 3xx are healthy. One HTTP/1.0 GET, of whose answer the first line is read.

use std::fmt;
use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{HealthError, HealthIndex};

/// Longest status line that is waited for, in bytes.
const STATUS_LINE_MAX: usize = 1024;

/// What to GET, and from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpTarget {
    /// A name or an address; an IPv6 address without its brackets.
    host: String,
    port: u16,
    /// Path and query, from the first `/`.
    path: String,
}

impl HttpTarget {
    /// Reads `http://HOST[:PORT][/PATH]`.
    ///
    /// # Errors
    /// What to do instead, as a text for the operator.
    pub fn parse(url: &str) -> Result<Self, &'static str> {
        if url.starts_with("https:") {
            return Err("only plain http:// is spoken; for TLS use exec:curl -fsk https://…");
        }
        let rest = url.strip_prefix("http://").ok_or("a URL looks like http://127.0.0.1:80/health")?;
        if rest.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err("no blanks and control characters in a URL");
        }
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let (host, port) = match authority.strip_prefix('[') {
            Some(v6) => {
                let (host, port) = v6.split_once(']').ok_or("the bracket around an IPv6 address is not closed")?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| "in brackets there must be an IPv6 address")?;
                (host, if port.is_empty() { Some("80") } else { port.strip_prefix(':') })
            }
            None => authority.split_once(':').map_or((authority, Some("80")), |(host, port)| (host, Some(port))),
        };
        if host.is_empty() || host.contains(['@', ']']) {
            return Err("there must be a host name or address behind http:// (and no user name)");
        }
        let port = port.and_then(|port| port.parse().ok()).filter(|port| *port != 0).ok_or("the port is no port")?;
        Ok(Self { host: host.to_owned(), port, path })
    }

    /// `HOST:PORT`, as a `Host:` header has it.
    fn authority(&self) -> String {
        let Self { host, port, .. } = self;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }
}

impl fmt::Display for HttpTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.authority(), self.path)
    }
}

/// Asks once.
pub(super) async fn evaluate(target: &HttpTarget) -> Result<HealthIndex, HealthError> {
    let line =
        status_line(target).await.map_err(|source| HealthError::Connection { target: target.authority(), source })?;
    if is_fine(&line) { Ok(HealthIndex::FULL) } else { Err(HealthError::HttpStatus(line)) }
}

async fn status_line(target: &HttpTarget) -> io::Result<String> {
    let mut stream = TcpStream::connect((target.host.as_str(), target.port)).await?;
    let request = format!(
        "GET {} HTTP/1.0\r\nHost: {}\r\nUser-Agent: necp-se\r\nAccept: */*\r\nConnection: close\r\n\r\n",
        target.path,
        target.authority()
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.contains(&b'\n') && answer.len() < STATUS_LINE_MAX {
        if stream.read_buf(&mut answer).await? == 0 {
            break;
        }
    }
    if answer.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed without an answer"));
    }
    let end = answer.iter().position(|byte| *byte == b'\n').unwrap_or(answer.len()).min(80);
    Ok(String::from_utf8_lossy(&answer[..end]).trim_end().to_owned())
}

fn is_fine(line: &str) -> bool {
    let mut words = line.split(' ');
    words.next().is_some_and(|version| version.starts_with("HTTP/1."))
        && words
            .next()
            .is_some_and(|code| code.len() == 3 && code.starts_with(['2', '3']) && code.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::TcpListener;

    use super::super::HealthSource;
    use super::*;

    /// A server that reads one request and answers with `answer`; returns what it was asked.
    async fn ask(answer: &'static str, keep_open: bool) -> (Result<u8, HealthError>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                assert_ne!(stream.read_buf(&mut request).await.expect("readable"), 0, "the request ends");
            }
            stream.write_all(answer.as_bytes()).await.expect("written");
            if keep_open {
                tokio::time::sleep(Duration::from_secs(600)).await;
            }
            String::from_utf8(request).expect("text")
        });
        let source: HealthSource = format!("http://127.0.0.1:{port}/up?x=1").parse().expect("a URL");
        let outcome = source.evaluate(Duration::from_millis(if keep_open { 300 } else { 10_000 })).await;
        if keep_open {
            server.abort();
            return (outcome.map(HealthIndex::get), String::new());
        }
        let request = server.await.expect("the server ended");
        (outcome.map(HealthIndex::get), request)
    }

    #[tokio::test]
    async fn two_and_three_hundreds_are_healthy() {
        let (outcome, request) = ask("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false).await;
        assert_eq!(outcome.expect("healthy"), 100);
        assert!(request.starts_with("GET /up?x=1 HTTP/1.0\r\nHost: 127.0.0.1:"), "{request}");
        assert_eq!(ask("HTTP/1.0 301 Moved\r\n\r\n", false).await.0.expect("healthy"), 100);
        assert_eq!(ask("HTTP/1.0 204", false).await.0.expect("healthy"), 100);
    }

    #[tokio::test]
    async fn everything_else_is_not() {
        let error = ask("HTTP/1.1 503 Service Unavailable\r\n\r\n", false).await.0.expect_err("503");
        assert_eq!(error.to_string(), "the server answered `HTTP/1.1 503 Service Unavailable`");
        for answer in ["SSH-2.0-x\r\n", "HTTP/1.1 2xx\r\n", "HTTP/1.1 2000\r\n", "HTTP/1.1\r\n", "\u{1}\u{2}"] {
            assert!(matches!(ask(answer, false).await.0, Err(HealthError::HttpStatus(_))), "{answer:?}");
        }
        assert!(matches!(ask("", false).await.0, Err(HealthError::Connection { .. })));
        assert!(matches!(ask("HTTP/1.1 20", true).await.0, Err(HealthError::Timeout(_))), "it never ends its line");
    }

    #[tokio::test]
    async fn nobody_listens() {
        let port = {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            listener.local_addr().expect("its address").port()
        };
        let source: HealthSource = format!("http://127.0.0.1:{port}/").parse().expect("a URL");
        let error = source.evaluate(Duration::from_secs(10)).await.expect_err("refused");
        assert!(error.to_string().contains(&format!("127.0.0.1:{port}: Connection refused")), "{error}");
    }

    #[test]
    fn urls() {
        let target = |url| HttpTarget::parse(url).map(|target| target.to_string());
        assert_eq!(target("http://localhost").as_deref(), Ok("http://localhost:80/"));
        assert_eq!(target("http://[::1]:8080/a").as_deref(), Ok("http://[::1]:8080/a"));
        assert_eq!(target("http://[::1]").as_deref(), Ok("http://[::1]:80/"));
        assert_eq!(target("http://a?b").as_deref(), Ok("http://a:80/?b"));
        for bad in [
            "http:",
            "http://",
            "http:///x",
            "http://a:0/",
            "http://a:x/",
            "http://a:70000/",
            "http://[::1",
            "http://[a]/",
            "http://[::1]80/",
            "http://u@h/",
            "http://a/b c",
            "http://a/\r\nX: y",
            "https://a/",
            "ftp://a/",
        ] {
            assert!(target(bad).is_err(), "{bad:?}");
        }
    }
}
