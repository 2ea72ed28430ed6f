// Package qemutest asks QEMU's tools about images: qemu-img, qemu-io and
// qemu-nbd are the oracles of the tests.
//
// # Purpose
//
// Each function runs one tool and fails the test when the tool does, with its
// output. A tool that is missing fails the test and names the Debian package:
// a test that cannot ask its oracle has not passed.
//
// # Concurrency
//
// All functions may be called from many goroutines, as far as testing.TB may.
// The tools take QEMU's image locks: an image that a test holds open for
// writing is refused, unless the function says otherwise.
package qemutest
