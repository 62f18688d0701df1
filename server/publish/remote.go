package publish

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/hallmark-id/hallmark/attestors/cloud"
)

const (
	maxAnswer = maxDocument
	maxCode   = 100 // bytes of an error code that are passed on
)

// refusal is what a cloud answers other than success.
type refusal struct {
	status int
	code   string // its own word for it; empty: it said none
	text   string
}

func (r *refusal) Error() string {
	if r.code == "" {
		return "it answered " + r.text
	}
	return fmt.Sprintf("it answered %s (%s)", r.text, r.code)
}

// refused makes an answer other than success a [refusal]. The rest of the answer, of
// which nobody knows what is in it, is left out.
func refused(err error) error {
	var status *cloud.StatusError
	if !errors.As(err, &status) {
		return err
	}
	r := &refusal{status: status.Code, text: fmt.Sprintf("%d %s", status.Code, http.StatusText(status.Code))}
	var asXML struct{ Code string }
	var asJSON struct {
		Error struct {
			Errors []struct{ Reason string }
		}
	}
	switch {
	case xml.Unmarshal(bytes.TrimPrefix(status.Body, []byte("\xef\xbb\xbf")), &asXML) == nil: // Azure begins with a mark of the byte order
		r.code = asXML.Code
	case json.Unmarshal(status.Body, &asJSON) == nil && len(asJSON.Error.Errors) > 0:
		r.code = asJSON.Error.Errors[0].Reason
	}
	if len(r.code) > maxCode || strings.ContainsFunc(r.code, func(c rune) bool { return c < '0' || c > 'z' }) {
		r.code = ""
	}
	return r
}

// remedy says of an error what to do about it: where there is no container of the
// objects, and what is needed to read and write them.
func remedy(err error, container, permissions string) error {
	var r *refusal
	switch {
	case !errors.As(err, &r):
		return err
	case r.status == http.StatusNotFound:
		return fmt.Errorf("%w: there is no %s; make it, or mend the configuration", err, container)
	case r.status == http.StatusForbidden, r.status == http.StatusUnauthorized:
		return fmt.Errorf("%w; let the server's credentials read and write there (%s)", err, permissions)
	case r.status/100 == 3:
		return fmt.Errorf("%w, which is not followed: the %s is elsewhere; mend the configuration", err, container)
	}
	return err
}

// is reports whether an answer has one of some statuses of HTTP.
func is(err error, statuses ...int) bool {
	var r *refusal
	if !errors.As(err, &r) {
		return false
	}
	for _, s := range statuses {
		if r.status == s {
			return true
		}
	}
	return false
}
