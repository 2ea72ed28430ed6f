// Package nbdexport serves virtual disks over the NBD protocol.
package nbdexport
