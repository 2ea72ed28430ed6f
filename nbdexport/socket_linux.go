package nbdexport

import (
	"net"

	"golang.org/x/sys/unix"
)

// sendBuffer is what the kernel may hold of replies that a client on a unix
// socket has not read. The usual 208 KiB are less than one long read: with them
// the server sleeps seven times for each MiB, with this less than three times.
const sendBuffer = 1 << 20 // bytes; the kernel counts its own overhead apart

// widen lets nc hold more unread replies if it is a unix socket; TCP sizes its
// buffers itself. That it fails costs speed only.
func widen(nc net.Conn) {
	socket, ok := nc.(*net.UnixConn)
	if !ok {
		return
	}
	err := error(unix.EINVAL)
	if raw, rawErr := socket.SyscallConn(); rawErr == nil {
		raw.Control(func(fd uintptr) { // fails only when closed
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer)
		})
	}
	if err != nil { // not allowed: as much as anybody may have
		socket.SetWriteBuffer(sendBuffer)
	}
}
