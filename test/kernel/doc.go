// Package kernel tests what needs a kernel of its own: the nbd driver, in the virtual machine of
// package vm. Its tests are built with the tag kernel, so that only `make test-kernel` runs them.
package kernel
