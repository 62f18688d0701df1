package feed

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/digest"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/store"
)

// writer cuts a change into messages of a bounded size and sends them. A
// message that the agent does not read in time ends the stream.
type writer struct {
	stream   Stream
	admitted func() error // asked before each message: the agent may leave the one before unread for long
	watchdog *time.Timer

	complete bool                 // the next message begins a complete set
	defaults *hallmarkv1.Defaults // for the next message

	message *hallmarkv1.FollowResponse
	size    int // bytes of message, about
}

func newWriter(g Stream, end context.CancelCauseFunc, admitted func() error) *writer {
	w := &writer{stream: g, admitted: admitted, message: &hallmarkv1.FollowResponse{}}
	w.watchdog = time.AfterFunc(SendTimeout, func() {
		end(fmt.Errorf("%w: it left a message unread for %v", ErrSlow, SendTimeout))
	})
	w.watchdog.Stop()
	return w
}

func (w *writer) close() { w.watchdog.Stop() }

func (w *writer) entry(e *hallmarkv1.Entry) error {
	if err := w.room(proto.Size(e)); err != nil {
		return err
	}
	w.message.Entries = append(w.message.Entries, e)
	return nil
}

func (w *writer) goneEntry(id string) error {
	if err := w.room(len(id)); err != nil {
		return err
	}
	w.message.GoneEntries = append(w.message.GoneEntries, id)
	return nil
}

func (w *writer) bundle(b *hallmarkv1.Bundle) error {
	if err := w.room(proto.Size(b)); err != nil {
		return err
	}
	w.message.Bundles = append(w.message.Bundles, b)
	return nil
}

func (w *writer) goneBundle(name string) error {
	if err := w.room(len(name)); err != nil {
		return err
	}
	w.message.GoneBundles = append(w.message.GoneBundles, name)
	return nil
}

// room sends the message off, with more to follow, if a part of a size would
// make it too large.
func (w *writer) room(size int) error {
	const framing = 8 // bytes of tag and length
	if w.size > 0 && w.size+size+framing > maxMessage {
		w.message.More = true
		if err := w.send(); err != nil {
			return err
		}
	}
	w.size += size + framing
	return nil
}

// finish sends the last message of a change.
func (w *writer) finish(rev store.Revision, sum digest.Sum) error {
	w.message.Revision = int64(rev)
	w.message.Digest = sum[:]
	return w.send()
}

// beat sends a message that changes nothing.
func (w *writer) beat(rev store.Revision, sum digest.Sum) error { return w.finish(rev, sum) }

func (w *writer) send() error {
	m := w.message
	m.Complete, m.Defaults = w.complete, w.defaults
	w.complete, w.defaults = false, nil
	w.message, w.size = &hallmarkv1.FollowResponse{}, 0
	if err := w.admitted(); err != nil {
		return err
	}
	w.watchdog.Reset(SendTimeout)
	defer w.watchdog.Stop()
	return w.stream.Send(m)
}
