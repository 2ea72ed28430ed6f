package holder

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// A message is a request or a reply, one packet each.
//
//	Offset  Size  Field    Meaning
//	     0     4  magic    "csqh"
//	     4     1  version  1
//	     5     1  code     of a request: what to do; of a reply: 0, or what went wrong
//	     6     2           0
//	     8        text     a name; in the reply to LIST names, each with "\n" behind it
type message struct {
	code code
	text string
	fds  []int
}

// A code is what a message asks for or answers.
type code uint8

const (
	codePut  code = 1
	codeGet  code = 2
	codeDrop code = 3
	codeList code = 4

	codeOK      code = 0
	codeNotHeld code = 1
	codeRefused code = 2
)

const (
	messageMagic   = "csqh"
	messageVersion = 1
	messageHeader  = 8 // bytes

	maxNames   = 1024
	maxName    = 160 // bytes
	maxFDs     = 4   // of one name
	maxMessage = messageHeader + maxNames*(maxName+1)
)

func (m *message) encode() []byte {
	return append([]byte{'c', 's', 'q', 'h', messageVersion, byte(m.code), 0, 0}, m.text...)
}

// decodeMessage decodes b, a packet of any length.
func decodeMessage(b []byte) (message, error) {
	switch {
	case len(b) < messageHeader || string(b[:4]) != messageMagic:
		return message{}, fmt.Errorf("holder: a packet of %d bytes is no message", len(b))
	case b[4] != messageVersion:
		return message{}, fmt.Errorf("holder: the peer speaks version %d, this program %d", b[4], messageVersion)
	}
	return message{code: code(b[5]), text: string(b[messageHeader:])}, nil
}

// send sends m on c.
func send(c *net.UnixConn, m message) error {
	var rights []byte
	if len(m.fds) > 0 {
		rights = unix.UnixRights(m.fds...)
	}
	_, _, err := c.WriteMsgUnix(m.encode(), rights, nil)
	return err
}

// receive receives a message on c. Its descriptors are the caller's.
func receive(c *net.UnixConn) (message, error) {
	b := make([]byte, maxMessage+1)
	rights := make([]byte, unix.CmsgSpace(4*maxFDs))
	n, rightsN, flags, _, err := c.ReadMsgUnix(b, rights) // close-on-exec
	if err != nil {
		return message{}, err
	}
	fds, err := descriptors(rights[:rightsN])
	if err == nil && (n > maxMessage || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0) {
		err = errors.New("holder: a message is too long")
	}
	var m message
	if err == nil {
		m, err = decodeMessage(b[:n])
	}
	if err != nil {
		closeAll(fds)
		return message{}, err
	}
	m.fds = fds
	return m, nil
}

// descriptors returns all descriptors in control messages, also with an error.
func descriptors(b []byte) ([]int, error) {
	var fds []int
	messages, err := unix.ParseSocketControlMessage(b)
	for i := range messages {
		more, parseErr := unix.ParseUnixRights(&messages[i])
		fds = append(fds, more...)
		err = errors.Join(err, parseErr)
	}
	return fds, err
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd) // nothing was written through it
	}
}

// checkPeer returns an error unless the other end of c is a process of this user.
func checkPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if credErr != nil {
		return credErr
	}
	if int(cred.Uid) != unix.Geteuid() {
		return fmt.Errorf("holder: the peer is a process of user %d, not of %d", cred.Uid, unix.Geteuid())
	}
	return nil
}
