// Package guest holds the tests that run inside the virtual machine of package vm, with the
// kernel's nbd driver. They are built with the tag kernelguest and started by package kernel.
package guest
