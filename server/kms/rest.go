package kms

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/attestors/cloud"
)

// maxCloudAnswer bounds an answer of a service's, in bytes: a page of a list.
const maxCloudAnswer = 1 << 20

var errNoAnswer = errors.New("it answered with something else than was asked")

// askWithToken asks a service that takes bearer tokens (RFC 6750 §2.1), and speaks
// JSON.
func askWithToken(ctx context.Context, api *cloud.Service, method, where, token string, in, out any) error {
	q := cloud.Question{Method: method, URL: where, Most: maxCloudAnswer, Header: map[string]string{"Authorization": "Bearer " + token}}
	if in != nil {
		body, err := json.Marshal(in)
		if err != nil {
			return err
		}
		q.Body, q.Header["Content-Type"] = string(body), "application/json"
	}
	answer, err := api.Do(ctx, q)
	var status *cloud.StatusError
	switch {
	case errors.As(err, &status) && status.Code == http.StatusNotFound:
		return apiv1.NotFoundError{Message: "no such key"}
	case errors.As(err, &status) && status.Code == http.StatusConflict:
		return apiv1.AlreadyExistsError{Message: "there is such a key, or was one until a while ago"}
	case errors.As(err, &status) && status.Code == http.StatusBadRequest:
		return refusal{err}
	case err != nil:
		return err
	case json.Unmarshal(answer.Body, out) != nil:
		return errNoAnswer
	}
	return nil
}
