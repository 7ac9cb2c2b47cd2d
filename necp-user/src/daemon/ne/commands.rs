//! What the network element's admin socket understands: `{"command":"status"}`.

use std::pin::Pin;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::input::Input;
use crate::daemon::admin::error;
use crate::daemon::status::Status;

/// How long the owner may take.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    command: String,
}

/// For [`AdminSocket::serve`](crate::daemon::admin::AdminSocket::serve): asks the owner.
pub fn answers(
    owner: mpsc::Sender<Input>,
) -> impl Fn(String) -> Pin<Box<dyn Future<Output = String> + Send>> + Clone + Send + 'static {
    move |line| {
        let owner = owner.clone();
        Box::pin(async move {
            match serde_json::from_str::<Request>(&line) {
                Ok(request) if request.command == "status" => status(&owner).await,
                Ok(request) => {
                    error(format_args!("unknown command `{}`; there is: status", request.command)).to_string()
                }
                Err(what) => {
                    error(format_args!("write one line such as {{\"command\":\"status\"}}: {what}")).to_string()
                }
            }
        })
    }
}

/// The answer to `status`.
#[derive(Serialize)]
struct Answer {
    status: Status,
}

async fn status(owner: &mpsc::Sender<Input>) -> String {
    let (done, status) = oneshot::channel();
    let _ = owner.send(Input::Status { done }).await;
    let Ok(Ok(status)) = timeout(PATIENCE, status).await else {
        return error("the daemon is shutting down, or too busy to answer").to_string();
    };
    // With thousands of servers these are megabytes: sessions need not wait for that.
    let text = tokio::task::spawn_blocking(move || serde_json::to_string(&Answer { status })).await;
    match text {
        Ok(Ok(text)) => text,
        Ok(Err(what)) => error(what).to_string(),
        Err(what) => error(what).to_string(),
    }
}
