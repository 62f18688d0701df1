package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

func TestEveryErrorHasItsCode(t *testing.T) {
	for _, c := range []struct {
		err  error
		code codes.Code
		text string
	}{
		{nil, codes.OK, ""},
		{invalidArgument("no %s", "good"), codes.InvalidArgument, "no good"},
		{fmt.Errorf("item 3: %w", invalidArgument("no good")), codes.InvalidArgument, "item 3: no good"},
		{&registry.Error{Kind: registry.Invalid, Msg: "m"}, codes.InvalidArgument, "m"},
		{&registry.Error{Kind: registry.NotFound, Msg: "m"}, codes.NotFound, "m"},
		{&registry.Error{Kind: registry.AlreadyExists, Msg: "m"}, codes.AlreadyExists, "m"},
		{&registry.Error{Kind: registry.FailedPrecondition, Msg: "m"}, codes.FailedPrecondition, "m"},
		{&registry.Error{Kind: registry.Contended, Msg: "m"}, codes.Aborted, "m"},
		{&registry.Error{Kind: 99, Msg: "m"}, codes.Unknown, "m"},
		{fmt.Errorf("entry: %w", &registry.Error{Kind: registry.NotFound, Msg: "m"}), codes.NotFound, "entry: m"},
		{&issue.InvalidError{Reason: "bad CSR"}, codes.InvalidArgument, "bad CSR"},
		{fmt.Errorf("sign: %w", authority.ErrUnavailable), codes.Unavailable, "try again"},
		{fmt.Errorf("commit: %w", store.ErrTooLarge), codes.InvalidArgument, "too large"},
		{fmt.Errorf("commit: %w", store.ErrNoQuorum), codes.Unavailable, "no majority"},
		{fmt.Errorf("commit: %w", store.ErrFull), codes.Unavailable, "no room"},
		{store.ErrClosed, codes.Unavailable, "stopping"},
		{context.Canceled, codes.Canceled, "cancelled"},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), codes.DeadlineExceeded, "deadline"},
		{grpcstatus.Error(codes.DataLoss, "decided"), codes.DataLoss, "decided"},
		// Another server's decision is not ours.
		{fmt.Errorf("upstream: %w", grpcstatus.Error(codes.PermissionDenied, "secret")), codes.Internal, "internal error"},
		{errors.New("open /var/lib/secret: no such file"), codes.Internal, "internal error"},
	} {
		err := status(c.err)
		if grpcstatus.Code(err) != c.code || !strings.Contains(grpcstatus.Convert(err).Message(), c.text) {
			t.Errorf("%v became %v, want %v with %q", c.err, err, c.code, c.text)
		}
		if c.code == codes.Internal {
			if strings.Contains(err.Error(), "secret") || !errors.Is(hiddenCause(err), c.err) {
				t.Errorf("%v became %v with cause %v", c.err, err, hiddenCause(err))
			}
		} else if hiddenCause(err) != nil {
			t.Errorf("%v has the hidden cause %v", err, hiddenCause(err))
		}
		if again := status(err); grpcstatus.Code(again) != c.code {
			t.Errorf("decided twice, %v became %v", c.err, again)
		}
	}
}

func TestAFailedItemOfABatchIsLoggedAndNotTold(t *testing.T) {
	var log strings.Builder
	st := itemStatus(slog.New(slog.NewTextHandler(&log, nil)), errors.New("disk full"))
	wantStatus(t, "item", st, codes.Internal, "internal error")
	if strings.Contains(st.Message, "disk") || !strings.Contains(log.String(), "disk full") {
		t.Errorf("told %q, logged %q", st.Message, log.String())
	}
	log.Reset()
	itemStatus(slog.New(slog.NewTextHandler(&log, nil)), invalidArgument("no good"))
	if log.Len() > 0 {
		t.Errorf("a caller's error was logged: %q", log.String())
	}
}
