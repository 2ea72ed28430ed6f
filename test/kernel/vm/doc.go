// Package vm runs a program in a small virtual machine, on a distribution's kernel: for tests
// of what this machine's kernel does not have, or must not be trusted with.
//
// The machine is QEMU under software emulation, so it needs neither KVM nor root. Its root
// file system is an initramfs of busybox, the wanted host programs with their libraries, the
// wanted kernel modules, and the program under test; there is no disk and no network.
// What the kernel prints and what the program prints come over two serial lines.
//
// Kernel and initramfs are made once and kept in a directory of the caller's; Debian's packages
// are the source, by apt-get. A change of the package, or of any file that goes in, makes new ones.
package vm
