from urllib.parse import parse_qs, unquote

import pytest

from moepp.tracking import pages


@pytest.mark.parametrize(
    ("uri", "base"),
    [
        ("http://tracker:8080/", "http://tracker:8080"),
        ("sqlite:////tmp/mlflow.db", "http://127.0.0.1:5001"),
        ("", "http://127.0.0.1:5001"),
    ],
)
def test_a_server_shows_its_own_pages_and_a_database_those_of_the_ui_command(uri, base):
    assert pages.address(uri, 5001) == base


def test_a_view_is_named_by_its_key_and_by_no_search_parameter():
    page, _, query = pages.view_page("http://t", "3", "feed-arms", charts=True).partition("?")
    assert page == "http://t/#/experiments/3/runs"
    expected = {"viewStateShareKey": ["feed-arms"], "compareRunsMode": ["CHART"], "workflowType": ["machine_learning"]}
    assert parse_qs(query) == expected


def test_a_comparison_is_one_word_and_names_each_experiment_once():
    page = pages.comparison_page("http://t", ["b", "a"], ["2", "1", "2"])
    assert '"' not in page and " " not in page
    assert unquote(page) == 'http://t/#/compare-runs?runs=["b","a"]&experiments=["1","2"]&workflowType=machine_learning'
