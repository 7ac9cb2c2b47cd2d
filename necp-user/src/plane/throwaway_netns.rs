//! A network namespace for one test: it exists as long as the test's thread, and needs no name.

use std::io;

/// Runs `test` on a thread of its own in a fresh network namespace whose `lo` is up, inside a one-thread tokio runtime
/// (threads that it starts for blocking work inherit the namespace).
///
/// # Panics
/// If `test` panics, or if no namespace can be had: the message says what is missing.
pub(crate) fn in_new_netns<T: Send + 'static>(test: impl AsyncFnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        // SAFETY: a system call without pointers; it changes this thread only.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            panic!(
                "this test needs a network namespace of its own (root or CAP_SYS_ADMIN): {}",
                io::Error::last_os_error()
            );
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().expect("a netlink socket");
            tokio::spawn(connection);
            let up = rtnetlink::LinkUnspec::new_with_name("lo").up().build();
            handle.link().set(up).execute().await.expect("lo comes up");
            test().await
        })
    });
    match thread.join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
